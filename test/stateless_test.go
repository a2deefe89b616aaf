// Starts over a state disk that hangs or fails.

package test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

var all = flag.Bool("all", false, "whether TestStartOverABadStateDisk hangs at each call, which takes minutes")

// hangingCalls are of each kind one, and those that a start waits for longest: a disk that
// hangs takes its time.
var hangingCalls = []string{
	"lookup state", "getattr state", "mkdir state", "create lock", "open lock", "lock lock", "write lock",
	"create snapstore", "open snapstore", "read snapstore", "lock snapstore", "fallocate snapstore",
	"open map", "read regions", "readdir devices",
}

// badStart is a start over a state disk of which all is bad from a call on.
type badStart struct {
	from   string
	fresh  bool // nobody has used the state directory before
	answer fuse.Status
}

func (s badStart) String() string {
	what := "hangs"
	if s.answer != fuse.OK {
		what = "fails"
	}
	if s.fresh {
		what += " at first"
	}
	return fmt.Sprintf("%s at %s", what, s.from)
}

// TestStartOverABadStateDisk has the state disk fail, or hang, at each call of a start: the
// origin is served all the same, and what was written meanwhile is in each increment that
// is told of later.
func TestStartOverABadStateDisk(t *testing.T) {
	needRoot(t)
	var starts []badStart
	fresh, again := startCalls(t)
	for _, call := range again {
		starts = append(starts, badStart{call, false, fuse.EIO})
	}
	for _, call := range fresh {
		if !slices.Contains(again, call) {
			starts = append(starts, badStart{call, true, fuse.EIO})
		}
	}
	for _, s := range slices.Clone(starts) {
		if *all || slices.Contains(hangingCalls, s.from) {
			starts = append(starts, badStart{s.from, s.fresh, fuse.OK})
		}
	}
	t.Logf("%d starts", len(starts))
	// Most of the time they wait, so several go on at once, on any machine.
	todo := make(chan badStart)
	var going sync.WaitGroup
	for range 8 {
		going.Go(func() {
			for s := range todo {
				t.Run(s.String(), s.run)
			}
		})
	}
	for _, s := range starts {
		todo <- s
	}
	close(todo)
	going.Wait()
}

// startCalls are the kinds of calls of a start on the state disk, of the first start and of
// one after it.
func startCalls(t *testing.T) (fresh, again []string) {
	t.Helper()
	disk, d, args := onBadDisk(t)
	d.start(args...)
	fresh = disk.said()
	d.awaitMap()
	d.stop()
	disk.spoil("", fuse.OK)
	d.start(args...)
	again = disk.said()
	d.stop()
	for _, calls := range [][]string{fresh, again} {
		for _, want := range []string{"lookup state", "getattr state", "lock lock", "write lock", "lock snapstore"} {
			if !slices.Contains(calls, want) {
				t.Errorf("a start did not %s, only %s", want, strings.Join(calls, ", "))
			}
		}
	}
	return fresh, again
}

// onBadDisk is a daemon with its state directory, and its snapstore, on a bad disk, and the
// arguments for its start.
func onBadDisk(t *testing.T) (*badDisk, *daemon, []string) {
	t.Helper()
	disk, d := newBadDisk(t), newDaemon(t, nil)
	d.state = filepath.Join(disk.dir, "state")
	t.Cleanup(disk.heal) // before the daemon is stopped that waits for it
	return disk, d, []string{makeOrigin(t, d.dir, "vda", miB)}
}

// awaitMap returns when the change map is written down.
func (d *daemon) awaitMap() {
	d.t.Helper()
	eventually(d.t, "the change map is written down", func() bool { return exists(filepath.Join(d.state, "devices", "vda", "map")) })
}

func (s badStart) run(t *testing.T) {
	disk, d, args := onBadDisk(t)
	generation, number := "", "0"
	if !s.fresh {
		d.start(args...)
		d.awaitMap()
		mkdir(t, d.snapshot("s1"))
		generation, number = read(t, d.device("vda", "cbt", "generation")), read(t, d.device("vda", "cbt", "number"))
		d.stop()
	}
	disk.spoil(s.from, s.answer)
	d.start(args...)
	bad := disk.isBad() // before it was ready
	live, p := d.open("vda"), make([]byte, 64*kiB)
	if err := live.readAt(p, 0); err != nil || Verify(p, "vda", 0, 1, 1) != nil {
		t.Fatalf("read: %v, %v", err, Verify(p, "vda", 0, 1, 1))
	}
	Stamp(p, "vda", 0, 2)
	if err := live.writeAt(p, 0); err != nil {
		t.Fatalf("write: %v", err)
	}
	if err := live.flush(); err != nil {
		t.Fatalf("flush: %v", err)
	}
	live.Close()
	if events := d.blksnap("events"); bad && strings.Contains(events, "state-lost") {
		s.checkStateless(t, d)
	}

	dirty := d.cmd.Process.Kill
	if len(s.from)%2 == 0 {
		dirty = func() error { return d.cmd.Process.Signal(syscall.SIGTERM) }
	}
	d.mayEnd = true
	if err := dirty(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon ends", d.isOver)
	disk.heal()
	d.waitForEnd()

	if got, err := os.ReadFile(args[0]); err != nil || !bytes.Equal(got[:len(p)], p) {
		t.Errorf("the write is not in the origin (%v)", err)
	}
	d.start(args...)
	d.checkWritten(generation, number, len(p))
	d.kill()
	d.reboot()
	d.start(args...)
	d.checkWritten(generation, number, len(p))
}

// isOver says whether the process has ended, or ends: then a thread of it may still wait for
// a disk.
func (d *daemon) isOver() bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil || !d.running() {
		return true
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch pending, _ := strconv.ParseUint(value, 16, 64); key {
		case "State":
			if strings.HasPrefix(value, "Z") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if pending>>(syscall.SIGKILL-1)&1 != 0 {
				return true
			}
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid))
	_, after, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(after)
	if err != nil || len(fields) < 7 {
		return true
	}
	const exiting = 4 // PF_EXITING: it closes its files
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return err != nil || flags&exiting != 0
}

// checkWritten looks whether the increment since a snapshot of generation holds the first n
// bytes, where it is told.
func (d *daemon) checkWritten(generation, number string, n int) {
	d.t.Helper()
	since := d.inside(d.device("vda", "cbt", "since", number))
	if !exists(since) {
		return
	}
	if now := read(d.t, d.inside(d.device("vda", "cbt", "generation"))); now != generation {
		d.t.Errorf("generation %s answers for number %s of %s", now, number, generation)
	}
	var off, length int
	if got := read(d.t, since); got == "" {
		d.t.Errorf("what was written is missing since %s", number)
	} else if _, err := fmt.Sscanf(got, "%d %d data", &off, &length); err != nil || off != 0 || length < n {
		d.t.Errorf("changed since %s\n got %q\nwant the first %d bytes in it", number, got, n)
	}
}

// checkStateless looks at what a daemon says that has no state directory.
func (s badStart) checkStateless(t *testing.T, d *daemon) {
	t.Helper()
	why := "state directory " + d.state
	if events := d.blksnap("events"); !strings.Contains(events, why) {
		t.Errorf("events do not mention %q:\n%s", why, events)
	}
	for _, command := range [][]string{{"snapshot", "create", "s2"}, {"state", "check"}} {
		if r := d.try(command...); r.status != 1 || !strings.Contains(r.stderr+r.stdout, why) {
			t.Errorf("%v ended with %d: %s%s, want 1, and why", command, r.status, r.stdout, r.stderr)
		}
	}
	d.blksnap("store", "add", "mem:16MiB")
	d.blksnap("snapshot", "create", "s2")
}

// TestStartOnAFullDisk starts where neither the state directory nor the snapstore can be
// made, or only one of them.
func TestStartOnAFullDisk(t *testing.T) {
	needRoot(t)
	full, used, readOnly := tmpfs(t, "size=64k,mode=700"), tmpfs(t, "size=64k,mode=700"), tmpfs(t, "size=1m,mode=700")
	sh(t, `mkdir -m 700 "$1/state" && echo 1 /nowhere > "$1/state/lock"`, used)
	for _, dir := range []string{full, used} {
		sh(t, `if head -c 1M /dev/zero > "$1/fill" 2> /dev/null; then exit 1; fi`, dir)
	}
	run(t, "mount", "-o", "remount,ro", readOnly)
	for _, tc := range []struct{ name, state, store, event string }{
		{"read-only", readOnly + "/state", "", "state-lost"},
		{"full", full + "/state", "", "state-lost"},
		{"full, and used before", used + "/state", "", "store-lost"},
		{"a snapstore elsewhere", readOnly + "/state", "mem:16MiB", "state-lost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDaemon(t, nil)
			d.state = tc.state
			args := []string{makeOrigin(t, d.dir, "vda", miB)}
			if tc.store != "" {
				args = append(args, "--store", tc.store)
			}
			d.start(args...)
			if events := d.blksnap("events"); !strings.Contains(events, tc.event) {
				t.Errorf("events do not mention %s:\n%s", tc.event, events)
			}
			qemuIO(t, d.uri("vda"), false, "write -P 7 0 64k", "read -P 7 0 64k", "flush")
			r := d.try("snapshot", "create", "s1")
			if tc.store == "" && (r.status != 1 || !strings.Contains(r.stderr, "there is no snapstore: ")) || tc.store != "" && r.status != 0 {
				t.Errorf("a snapshot ended with %d: %s", r.status, r.stderr)
			}
			d.stop()
		})
	}
}

// TestStartWithADeadPart gives serve a part of the snapstore on a disk that does not answer,
// beside one that does.
func TestStartWithADeadPart(t *testing.T) {
	needRoot(t)
	dir, answer := newDeadDir(t)
	d := newDaemon(t, nil)
	t.Cleanup(answer) // before the daemon is stopped that waits for it
	d.start(makeOrigin(t, d.dir, "vda", miB), "--store", "file:"+dir+"/below:16MiB", "--store", "mem:16MiB")
	if events := d.blksnap("events"); !strings.Contains(events, "store-lost") || !strings.Contains(events, dir+"/below: it hangs") {
		t.Errorf("events do not mention the part:\n%s", events)
	}
	d.blksnap("snapshot", "create", "s1")
	if got := len(d.json("store", "list", "--json")); got != 1 {
		t.Errorf("the snapstore has %d parts, want 1", got)
	}
}

// TestCheckOverADeadPart verifies the state of a daemon while the snapstore's disk does not
// answer, which may be one that was spun down: nobody is told to make the snapstore anew.
func TestCheckOverADeadPart(t *testing.T) {
	needRoot(t)
	disk, d := newBadDisk(t), newDaemon(t, nil)
	t.Cleanup(disk.heal) // before the daemon is stopped that waits for it
	part := filepath.Join(disk.dir, "snapstore")
	d.start(makeOrigin(t, d.dir, "vda", miB), "--store", "file:"+part+":16MiB")
	disk.spoil("open snapstore", fuse.OK)
	r := d.try("state", "check")
	if out := r.stdout + r.stderr; r.status != 1 || !strings.Contains(out, part+": it does not answer") || strings.Contains(out, "--force") {
		t.Errorf("state check ended with %d: %s\nwant 1, that %s does not answer, and not to make it anew", r.status, out, part)
	}
	disk.heal()
	if r := d.try("state", "check"); r.status != 0 {
		t.Errorf("state check ended with %d when the disk answered again: %s%s", r.status, r.stdout, r.stderr)
	}
}

// TestServeRefusesAWrongState gives serve state directories that cannot be what was meant.
func TestServeRefusesAWrongState(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	write(t, filepath.Join(dir, "file"), nil)
	mkdir(t, filepath.Join(dir, "others"))
	if err := os.Chown(filepath.Join(dir, "others"), 1, 1); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "nowhere"), filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	origin := makeOrigin(t, dir, "vda", miB)
	for state, want := range map[string]string{
		"/proc/blksnap":                     "create directory",
		filepath.Join(dir, "file"):          "is not a directory",
		filepath.Join(dir, "file", "below"): "not a directory",
		filepath.Join(dir, "dangling", "x"): "no such file",
		filepath.Join(dir, "others"):        "belongs to user 1",
	} {
		d := newDaemon(t, nil)
		r := d.try("serve", "--mount", "none", "--run", d.runDir, "--state", state, "--store", "mem:16MiB", origin)
		if r.status != 1 || !strings.Contains(r.stderr, want) {
			t.Errorf("state directory %s: status %d, %q; want 1, and %q", state, r.status, r.stderr, want)
		}
	}
}
