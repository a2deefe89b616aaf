// Starts that are not like the one before.

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The parts of the snapstore in another order: an image reads its own bytes. Where
// nobody knows any more which part was which, it is gone rather than wrong.
func TestStoresInAnotherOrder(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name   string
		damage func(set string) error
		lives  bool
	}{
		{"known", func(string) error { return nil }, true},
		{"forgotten", os.Remove, false},
		{"damaged", func(set string) error { return os.WriteFile(set, []byte("{"), 0o600) }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const size = 8 * miB
			dir := scratch(t)
			first, second := "file:"+dir+"/first:1MiB", "file:"+dir+"/second:32MiB"
			d, origin := serveOrigin(t, size, "--store", first, "--store", second)
			generation := read(t, d.device("vda", "cbt", "generation"))
			mkdir(t, d.snapshot("s1"))
			number := readNumber(t, d.snapshot("s1", "vda.cbt", "number"))
			p := make([]byte, size)
			Stamp(p, "vda", 0, 2)
			if err := d.open("vda").writeAt(p, 0); err != nil {
				t.Fatal(err)
			}
			d.kill()
			if err := tc.damage(filepath.Join(d.runDir, "set.json")); err != nil {
				t.Fatal(err)
			}

			d.start("--store", second, "--store", first, origin)
			if got := exists(d.snapshot("s1")); got != tc.lives {
				t.Fatalf("the snapshot is there: %v, want %v", got, tc.lives)
			}
			if tc.lives {
				image, err := os.ReadFile(d.snapshot("s1", "vda.img"))
				if err != nil {
					t.Fatal(err)
				}
				written := Verify(image[:size/2], "vda", 0, 1, 1)
				if err := errors.Join(written, Verify(image[size/2:], "vda", size/2, 0, 0)); err != nil {
					t.Error(err)
				}
			}
			// What was written is in the increment, or a full copy is due.
			now, since := read(t, d.device("vda", "cbt", "generation")), d.device("vda", "cbt", "since", fmt.Sprint(number))
			if now != generation && exists(since) {
				t.Error("a new generation answers for a number of the one before")
			}
			if now == generation {
				if got, want := read(t, since), fmt.Sprintf("0 %d data", size); got != want {
					t.Errorf("changed since the snapshot\n got %q\nwant %q", got, want)
				}
			}
		})
	}
}

// Where what was preserved is not to be had any more, the images that need it say so,
// and the others live on.
func TestPartsThatAreGone(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	for _, tc := range []struct{ name, before, after, want string }{
		{"memory", "mem:8MiB", "mem:8MiB", "failed: blocks that it needs are lost: part 1 of the snapstore was in memory, which ended with the process before"},
		{"a file", "file:" + dir + "/a:8MiB", "file:" + dir + "/b:8MiB", "failed: blocks that it needs are lost: part 1 of the snapstore is not there"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, origin := serveOrigin(t, miB, "--store", tc.before)
			mkdir(t, d.snapshot("old"))
			if err := d.open("vda").writeAt(make([]byte, 4*kiB), 0); err != nil {
				t.Fatal(err)
			}
			d.blksnap("snapshot", "create", "--writable", "written")
			if err := d.open("vda@written").writeAt(make([]byte, 4*kiB), 0); err != nil {
				t.Fatal(err)
			}
			mkdir(t, d.snapshot("new"))
			d.kill()
			d.start(origin, "--store", tc.after)
			written := strings.Replace(tc.want, "blocks that it needs are lost", "some of what was written to it is lost", 1)
			for name, want := range map[string]string{"old": tc.want, "written": written, "new": "ok"} {
				if got := read(t, d.snapshot(name, "vda.state")); got != want {
					t.Errorf("state of %s\n got %s\nwant %s", name, got, want)
				}
			}
		})
	}
}

// Something else where a file of the daemon's was: a start goes on without what was
// in it, or says why it cannot, and does not hang.
func TestStateThatIsNoFile(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, miB)
	mkdir(t, d.snapshot("s1"))
	if err := d.open("vda").writeAt(make([]byte, 64*kiB), 0); err != nil {
		t.Fatal(err)
	}
	d.blksnap("snapshot", "create", "--writable", "s2")
	d.kill()
	var files []string
	for _, dir := range []string{d.runDir, d.state} {
		err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range files {
		name, err := filepath.Rel(d.dir, path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.ReplaceAll(name, "/", " "), func(t *testing.T) {
			e := newDaemon(t, nil)
			sh(t, `cp -a "$1" "$2" "$3"; rm -f "$3"/*/*.sock "$3/$4"; mkfifo "$3/$4"`, d.runDir, d.state, e.dir, name)
			cmd := e.command("serve", "--mount", "none", "--run", e.runDir, "--state", e.state, origin)
			cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
			served := &log{}
			cmd.Stdout, cmd.Stderr = served, served
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() {
				cmd.Wait()
				close(ended)
			}()
			defer func() {
				cmd.Process.Kill()
				<-ended
			}()
			eventually(t, "the start has succeeded, or failed", func() bool {
				select {
				case <-ended:
					return true
				default:
					return strings.Contains(served.String(), "ready\n")
				}
			})
			t.Log(served)
		})
	}
}

// A start with the wrong stores, or without a device, that fails: the next one, with
// the right ones, finds every snapshot as it was.
func TestStartThatFailsCostsNothing(t *testing.T) {
	needRoot(t)
	const size = 4 * miB
	dir := scratch(t)
	a, b := makeOrigin(t, dir, "a", size), makeOrigin(t, dir, "b", size)
	right := []string{a, b, "--store", "file:" + dir + "/right:32MiB"}
	d := serve(t, right...)
	d.blksnap("snapshot", "create", "--writable", "s1")
	p := make([]byte, size)
	for _, name := range []string{"a", "b"} {
		if err := errors.Join(d.open(name).writeAt(p, 0), d.open(name+"@s1").writeAt(p[:miB], miB)); err != nil {
			t.Fatal(err)
		}
	}
	images := func() []string {
		return []string{checksum(t, d.snapshot("s1", "a.img")), checksum(t, d.snapshot("s1", "b.img"))}
	}
	before := images()
	d.kill()
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"another store, and a mount point that is not there", []string{a, b, "--store", "mem:8MiB", "--mount", dir + "/none"}, "none"},
		{"another store, and an origin that is not there", []string{a, dir + "/b2.img", "--store", "file:" + dir + "/wrong:8MiB"}, "b2.img"},
		{"a device less, and a mount point that is not there", []string{a, "--store", "mem:8MiB", "--mount", dir + "/none"}, "none"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := append([]string{"serve", "--run", d.runDir, "--state", d.state}, tc.args...)
			if !slices.Contains(args, "--mount") {
				args = append(args, "--mount", d.mount)
			}
			wantRefused(t, end(t, d.command(args...)), 1, tc.want)
		})
	}
	d.start(right...)
	if got := read(t, d.snapshot("s1", "state")); got != "ok" {
		t.Errorf("state of the snapshot\n got %s\nwant ok", got)
	}
	if got := images(); !slices.Equal(got, before) {
		t.Errorf("checksums of the images\n got %v\nwant %v", got, before)
	}
}

// A device that the command line does not name any more is not served any more;
// one that was added at run time is back.
func TestDevicesAfterARestart(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	a, b, c := makeOrigin(t, dir, "a", miB), makeOrigin(t, dir, "b", miB), makeOrigin(t, dir, "c", miB)
	d := serve(t, a, b)
	d.blksnap("device", "add", c)
	mkdir(t, d.snapshot("s1"))
	for round := range 2 { // what is found again is kept again
		d.kill()
		d.start(a)
		want := []string{"a  1048576  " + d.uri("a"), "c  1048576  " + d.uri("c")}
		if !slices.Equal(d.uris, want) {
			t.Errorf("start %d serves\n got %q\nwant %q", round, d.uris, want)
		}
		if got, want := read(t, d.snapshot("s1", "state")), "failed: 1 of 3 images were lost before the last start"; got != want {
			t.Errorf("state of the snapshot\n got %s\nwant %s", got, want)
		}
	}
	rmdir(t, d.snapshot("s1"))
	d.blksnap("device", "remove", "c")
	d.stop()
	d.start(a, b)
	want := []string{"a  1048576  " + d.uri("a"), "b  1048576  " + d.uri("b")}
	if !slices.Equal(d.uris, want) {
		t.Errorf("the last start serves\n got %q\nwant %q", d.uris, want)
	}
}

// A start with directories of its own, whose origin or snapstore another daemon has:
// it waits if that is stopping, and is refused at once if not.
func TestStartWhileAnotherStops(t *testing.T) {
	needRoot(t)
	slow, gate := gatedOrigin(t, miB)
	dir := scratch(t)
	origin, store := makeOrigin(t, dir, "vda", miB), "file:"+dir+"/store:8MiB"
	d := newDaemon(t, nil)
	d.start("vda="+origin, "slow="+slow, "--store", store)
	client := d.open("slow")
	gate.shut()
	if err := client.request(NBD_CMD_WRITE, 0, 0, 4*kiB, make([]byte, 4*kiB)); err != nil {
		t.Fatal(err)
	}
	<-gate.entered

	e := newDaemon(t, nil)
	args := []string{"serve", "--mount", "none", "--run", e.runDir, "--state", e.state, "vda=" + origin, "--store"}
	begun := time.Now()
	wantRefused(t, end(t, e.command(append(args, store)...)), 1, "in use by another process")
	wantRefused(t, end(t, e.command(append(args, "mem:8MiB")...)), 1, "another blksnap")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("a start with what a daemon is serving was refused after %v", took)
	}

	d.cmd.Process.Signal(syscall.SIGTERM)
	d.mayEnd = true
	eventually(t, "the daemon is stopping", func() bool { return strings.Contains(d.stderr.String(), "msg=stopping") })
	stdout := e.launchPlain(append(args[1:], store)...)
	select {
	case <-e.ended:
		t.Errorf("a start with what a stopping daemon has was refused\n%s", e.stderr)
	case <-time.After(500 * time.Millisecond):
	}
	gate.open()
	<-d.ended
	e.awaitReady(stdout)
	if got := e.blksnap("device", "list"); !strings.Contains(got, origin) {
		t.Errorf("devices: %s", got)
	}
}
