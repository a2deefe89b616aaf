// Run directories that have no room for a device's state, or refuse it.

package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// runOn puts the daemon's run directory on a small file system of its own.
func runOn(t *testing.T) (d *daemon, disk string) {
	t.Helper()
	disk = tmpfs(t, "size=4m,mode=755")
	d = newDaemon(t, nil)
	d.runDir = filepath.Join(disk, "run")
	d.env = append(d.env, "BLKSNAP_CONTROL="+filepath.Join(d.runDir, "control.sock"))
	return d, disk
}

// stampLive writes 64 KiB of a later pass to a device, at off.
func stampLive(t *testing.T, d *daemon, device string, off int64, pass uint64) {
	t.Helper()
	live, p := d.open(device), make([]byte, 64*kiB)
	defer live.Close()
	Stamp(p, device, off, pass)
	if err := live.writeAt(p, off); err != nil {
		t.Fatalf("write to %s: %v", device, err)
	}
}

// wantImage checks that the first 64 KiB of an image are of a pass.
func wantImage(t *testing.T, d *daemon, snapshot, device string, pass uint64) {
	t.Helper()
	image, err := os.ReadFile(d.snapshot(snapshot, device+".img"))
	if err == nil {
		err = Verify(image[:64*kiB], device, 0, pass, pass)
	}
	if err != nil {
		t.Errorf("image of %s in %s: %v", device, snapshot, err)
	}
}

// wantInMemory checks that everybody is told that a device's state is in memory, and why.
func wantInMemory(t *testing.T, d *daemon, device, why string) {
	t.Helper()
	says := func(what, text, want string) {
		t.Helper()
		if !strings.Contains(text, want) {
			t.Errorf("%s\n got %s\nwant %q", what, text, want)
		}
	}
	state, shown := read(t, d.device(device, "state")), d.blksnap("device", "show", device)
	says("state", state, "ok, in memory only: ")
	says("state", state, why)
	says("device show", shown, state)
	says("reason of the generation", fmt.Sprint(d.json("device", "show", device)[0]["cbt"].(map[string]any)["reason"]), why)
	told := slices.ContainsFunc(d.json("events"), func(e map[string]any) bool {
		return e["kind"] == "generation" && e["device"] == device && strings.Contains(fmt.Sprint(e["text"]), why)
	})
	if !told {
		t.Errorf("events: got %v, want one of the generation of %s", d.json("events"), device)
	}
	says("log", d.stderr.String(), "start the daemon anew")
}

// A device that is new when the run directory is full is served all the same, with its
// state in memory; others are as they were. What was in memory is nowhere afterwards, and
// nobody takes that for nothing: only a reboot has the map that was written down.
func TestNewDeviceInAFullRunDirectory(t *testing.T) {
	needRoot(t)
	for _, then := range []struct {
		name   string
		end    func(*daemon)
		reboot bool
	}{
		{"stopped", (*daemon).stop, false},
		{"killed", (*daemon).kill, false},
		{"stopped, and a reboot", (*daemon).stop, true},
		{"killed, and a reboot", (*daemon).kill, true},
	} {
		t.Run(then.name, func(t *testing.T) {
			const size = miB
			d, disk := runOn(t)
			store := []string{"--store", "file:" + d.dir + "/store:8MiB"}
			args := append(store, makeOrigin(t, d.dir, "vda", size))
			d.start(args...)
			mkdir(t, d.snapshot("s1"))
			stampLive(t, d, "vda", 0, 2)
			generation, number := read(t, d.device("vda", "cbt", "generation")), read(t, d.device("vda", "cbt", "number"))
			fill := filepath.Join(disk, "fill")
			sh(t, `if head -c 8M /dev/zero > "$1" 2> /dev/null; then exit 1; fi`, fill)
			d.stop()

			args = append(args, makeOrigin(t, d.dir, "vdb", size))
			d.start(args...)
			if got := read(t, d.device("vda", "state")); got != "ok" {
				t.Errorf("state of the other device: got %s, want ok", got)
			}
			if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
				t.Errorf("the other device has generation %s, want %s", got, generation)
			}
			wantImage(t, d, "s1", "vda", 1)
			wantInMemory(t, d, "vdb", "no space left on device")
			d.blksnap("snapshot", "create", "s2", "--device", "vdb")
			stampLive(t, d, "vdb", 0, 2)
			wantImage(t, d, "s2", "vdb", 1)
			memory, since := read(t, d.device("vdb", "cbt", "generation")), read(t, d.device("vdb", "cbt", "number"))
			if got, want := read(t, d.device("vdb", "cbt", "since", since)), "0 65536 data"; got != want {
				t.Errorf("changed since the snapshot\n got %q\nwant %q", got, want)
			}
			d.blksnap("state", "check")
			eventually(t, "the change map is written down", func() bool { return exists(filepath.Join(d.state, "devices", "vdb", "map")) })
			then.end(d)

			remove(t, fill)
			if then.reboot {
				d.reboot()
			}
			d.start(args...)
			device := func(elem ...string) string { return d.inside(d.device(elem...)) }
			for _, name := range []string{"vda", "vdb"} {
				if got := read(t, device(name, "state")); got != "ok" {
					t.Errorf("state of %s: got %s, want ok", name, got)
				}
			}
			if got := read(t, device("vda", "cbt", "generation")); got != generation {
				t.Errorf("the other device has generation %s, want %s", got, generation)
			}
			if got := read(t, device("vda", "cbt", "since", number)); !strings.HasPrefix(got, "0 ") {
				t.Errorf("changed on the other device: got %q, want it from 0 on", got)
			}
			now, known := read(t, device("vdb", "cbt", "generation")), exists(device("vdb", "cbt", "since", since))
			if (now == memory) != then.reboot || known != then.reboot {
				t.Errorf("the generation goes on: %v, and answers for a number of before: %v, want %v", now == memory, known, then.reboot)
			}
			if then.reboot {
				return
			}
			wantImage(t, d, "s1", "vda", 1)
			if got := read(t, d.snapshot("s2", "state")); !strings.HasPrefix(got, "failed: ") {
				t.Errorf("state of the snapshot that was in memory: got %s, want failed", got)
			}
		})
	}
}

// refusals are what may be read-only of a device's state, in its directory.
var refusals = []struct{ name, path string }{
	{"the directory", ""},
	{"the lease", "lease"},
	{"the change map", "changes"},
	{"the register", "layers"},
	{"a layer", "layer-0"},
}

// makeReadOnly makes a file or directory read-only until heal is called.
func makeReadOnly(t *testing.T, path string) (heal func()) {
	t.Helper()
	run(t, "mount", "--bind", path, path)
	run(t, "mount", "-o", "remount,bind,ro", path)
	heal = sync.OnceFunc(func() {
		if err := unmount(path); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(heal)
	return heal
}

// A device whose files in the run directory cannot be used is served all the same. When
// they can be used again, they are of the time before that, and nobody believes them: the
// device is a block device, of which nothing else tells what was written to it.
func TestReadOnlyRunFiles(t *testing.T) {
	needRoot(t)
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			const size = 4 * miB
			d, _ := runOn(t)
			vdb := loop(t, makeOrigin(t, d.dir, "vdb", size), false)
			args := []string{"--store", "file:" + d.dir + "/store:8MiB", makeOrigin(t, d.dir, "vda", size), "vdb=" + vdb}
			d.start(args...)
			mkdir(t, d.snapshot("s1"))
			generations, number := []string{read(t, d.device("vdb", "cbt", "generation"))}, read(t, d.device("vdb", "cbt", "number"))
			stampLive(t, d, "vdb", 0, 2)
			d.kill()
			path := filepath.Join(d.runDir, "devices", "vdb", r.path)
			heal := makeReadOnly(t, path)

			d.start(args...)
			wantInMemory(t, d, "vdb", path)
			wantImage(t, d, "s1", "vda", 1)
			if got := read(t, d.snapshot("s1", "state")); !strings.HasPrefix(got, "failed: ") {
				t.Errorf("state of the snapshot: got %s, want failed", got)
			}
			d.blksnap("state", "check")
			look := func(what string) {
				t.Helper()
				now := read(t, d.device("vdb", "cbt", "generation"))
				if slices.Contains(generations, now) {
					t.Errorf("%s an earlier generation goes on", what)
				}
				if exists(d.device("vdb", "cbt", "since", number)) {
					t.Errorf("%s a number of an earlier generation is answered for", what)
				}
				if exists(d.snapshot("s1", "vdb.img")) {
					t.Errorf("%s there is an image", what)
				}
				generations = append(generations, now)
			}
			look("in memory")
			stampLive(t, d, "vdb", 0, 3)
			d.kill()
			d.start(args...)
			wantInMemory(t, d, "vdb", path)
			look("in memory once more")
			d.kill()
			heal()
			d.start(args...)
			if got := read(t, d.device("vdb", "state")); got != "ok" {
				t.Errorf("state: got %s, want ok", got)
			}
			look("over old files")
			wantImage(t, d, "s1", "vda", 1)
			d.kill()
			d.start(args...)
			if got := read(t, d.device("vdb", "cbt", "generation")); got != generations[3] {
				t.Errorf("generation\n got %s\nwant %s: its state is kept", got, generations[3])
			}
		})
	}
}

// Files of a device that are to be given up, and cannot be removed: nobody believes them
// later, and every start serves what it is told to.
func TestRunFilesThatStay(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name   string
		absent bool // the next start does not name the device
		before func(t *testing.T, d *daemon)
	}{
		{"another boot", false, func(t *testing.T, d *daemon) {
			d.bootID = filepath.Join(d.dir, "boot_id")
			write(t, d.bootID, []byte(uuid.NewString()+"\n"))
		}},
		{"no set file", false, func(t *testing.T, d *daemon) { remove(t, d.runDir, "set.json") }},
		{"no catalogue", false, func(t *testing.T, d *daemon) { remove(t, d.runDir, "catalogue") }},
		{"a device less", true, func(*testing.T, *daemon) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const size = 4 * miB
			d, _ := runOn(t)
			args := []string{"--store", "file:" + d.dir + "/store:8MiB", makeOrigin(t, d.dir, "vda", size)}
			both := append(slices.Clone(args), "vdb="+loop(t, makeOrigin(t, d.dir, "vdb", size), false))
			d.start(both...)
			mkdir(t, d.snapshot("s1"))
			generation, number := read(t, d.device("vdb", "cbt", "generation")), read(t, d.device("vdb", "cbt", "number"))
			stampLive(t, d, "vdb", 0, 2)
			d.kill()
			unmount(d.mount) // the next may have a namespace of its own
			heal := makeReadOnly(t, filepath.Join(d.runDir, "devices", "vdb"))
			tc.before(t, d)

			if tc.absent {
				d.start(args...)
			} else {
				d.start(both...)
				if got := read(t, d.inside(d.device("vdb", "state"))); !strings.HasPrefix(got, "ok, in memory only: ") {
					t.Errorf("state: got %s, want in memory only", got)
				}
				stampLive(t, d, "vdb", 0, 3)
			}
			d.blksnap("state", "check")
			d.kill()
			heal()
			d.start(both...)
			if got := read(t, d.inside(d.device("vdb", "state"))); got != "ok" {
				t.Errorf("state: got %s, want ok", got)
			}
			if read(t, d.inside(d.device("vdb", "cbt", "generation"))) == generation {
				t.Error("the generation of before goes on")
			}
			if exists(d.inside(d.device("vdb", "cbt", "since", number))) {
				t.Error("a number of the generation of before is answered for")
			}
			if exists(d.inside(d.snapshot("s1", "vdb.img"))) {
				t.Error("there is an image of before")
			}
		})
	}
}

// remove removes a file.
func remove(t *testing.T, path ...string) {
	t.Helper()
	if err := os.Remove(filepath.Join(path...)); err != nil {
		t.Fatal(err)
	}
}

// A start that fails takes nothing from a device whose files it could not use.
func TestFailedStartOverReadOnlyRunFiles(t *testing.T) {
	needRoot(t)
	for _, r := range refusals[:4] {
		t.Run(r.name, func(t *testing.T) {
			d, _ := runOn(t)
			args := []string{"--store", "file:" + d.dir + "/store:8MiB", makeOrigin(t, d.dir, "vda", miB)}
			d.start(args...)
			mkdir(t, d.snapshot("s1"))
			generation := read(t, d.device("vda", "cbt", "generation"))
			stampLive(t, d, "vda", 0, 2)
			d.stop()
			heal := makeReadOnly(t, filepath.Join(d.runDir, "devices", "vda", r.path))
			serve := append([]string{"serve", "--mount", d.mount, "--run", d.runDir, "--state", d.state}, args...)
			if got := end(t, d.command(append(serve, "vdb="+d.dir+"/missing")...)); got.status != 1 || !strings.Contains(got.stderr, "missing") {
				t.Fatalf("a start without an origin: status %d, %s", got.status, got.stderr)
			}
			heal()
			d.start(args...)
			if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
				t.Errorf("generation\n got %s\nwant %s", got, generation)
			}
			wantImage(t, d, "s1", "vda", 1)
		})
	}
}

// A start that finds no room for the last of a device's files, and fails, leaves no lease:
// who writes to the device until the next start is somebody else.
func TestLeaseIsLast(t *testing.T) {
	needRoot(t)
	d, disk := runOn(t)
	origin := makeOrigin(t, d.dir, "vda", miB)
	serve := []string{"serve", "--mount", "none", "--run", d.runDir, "--state", d.state, "--store", "file:" + d.dir + "/store:8MiB", origin, "vdb=" + d.dir + "/missing"}
	leased := func(elem ...string) bool {
		b, err := os.ReadFile(filepath.Join(append([]string{d.runDir, "devices", "vda"}, elem...)...))
		return err == nil && len(b) > 0 && slices.ContainsFunc(b[:8], func(c byte) bool { return c != 0 })
	}
	without := false
	for files := 1; !leased("lease"); files++ { // which there may be
		if files == 50 {
			t.Fatalf("no lease where %d files may be made", files)
		}
		if err := os.RemoveAll(d.runDir); err != nil {
			t.Fatal(err)
		}
		run(t, "mount", "-o", fmt.Sprintf("remount,nr_inodes=%d", files+1), disk)
		if got := end(t, d.command(serve...)); got.status != 1 {
			t.Fatalf("a start without an origin: status %d, %s", got.status, got.stderr)
		}
		without = without || leased("changes") && leased("layers") && !leased("lease")
	}
	if !without || !leased("changes") || !leased("layers") {
		t.Errorf("the lease was made as the last: %v, and the others are there: %v, %v", without, leased("changes"), leased("layers"))
	}
}

// A device that somebody adds to a daemon is refused where its state cannot be kept: who
// added it is told, and nobody depends on it yet.
func TestAddToAFullRunDirectory(t *testing.T) {
	needRoot(t)
	d, disk := runOn(t)
	d.start("--store", "file:"+d.dir+"/store:8MiB", makeOrigin(t, d.dir, "vda", miB))
	fill := filepath.Join(disk, "fill")
	sh(t, `if head -c 8M /dev/zero > "$1" 2> /dev/null; then exit 1; fi`, fill)
	vdb := makeOrigin(t, d.dir, "vdb", miB)
	wantRefused(t, d.try("device", "add", vdb), 1, unix.ENOSPC.Error())
	remove(t, fill)
	d.blksnap("device", "add", vdb)
	if got := read(t, d.device("vdb", "state")); got != "ok" {
		t.Errorf("state: got %s, want ok", got)
	}
}

// A user's directory of all devices' files, which its own mode closes to the daemon: nothing
// is lost.
func TestForbiddenDirectoryOfDevices(t *testing.T) {
	needRoot(t)
	for _, mode := range []os.FileMode{0, 0o300, 0o400, 0o500} {
		t.Run(mode.String(), func(t *testing.T) {
			d := newDaemon(t, nobody)
			origin := makeOrigin(t, d.dir, "vda", miB)
			if err := os.Chown(origin, int(nobody.Uid), int(nobody.Gid)); err != nil {
				t.Fatal(err)
			}
			args := []string{"--mount", "none", "--run", d.runDir, "--state", d.state, "--store", "file:" + d.dir + "/store:8MiB", origin}
			d.startPlain(args...)
			d.blksnap("snapshot", "create", "s1")
			was := d.blksnap("device", "show", "vda")
			d.kill()
			if err := os.Chmod(filepath.Join(d.runDir, "devices"), mode); err != nil {
				t.Fatal(err)
			}
			d.startPlain(args...)
			if got := d.blksnap("device", "show", "vda"); got != was {
				t.Errorf("the device\n got %s\nwant %s", got, was)
			}
			if got := fmt.Sprint(d.json("snapshot", "show", "s1")[0]["state"]); got != "ok" {
				t.Errorf("state of the snapshot: got %s, want ok", got)
			}
		})
	}
}

// A user's files that their own mode closes to the daemon, of a device that the next start
// names or does not name. Their layers' slots are given to others meanwhile.
func TestForbiddenRunFiles(t *testing.T) {
	needRoot(t)
	for _, absent := range []bool{false, true} {
		t.Run(fmt.Sprintf("absent %v", absent), func(t *testing.T) {
			d := newDaemon(t, nobody)
			var origins []string
			for _, name := range []string{"vda", "vdb"} {
				origin := makeOrigin(t, d.dir, name, miB)
				if err := os.Chown(origin, int(nobody.Uid), int(nobody.Gid)); err != nil {
					t.Fatal(err)
				}
				origins = append(origins, origin)
			}
			args := []string{"--mount", "none", "--run", d.runDir, "--state", d.state, "--store", "file:" + d.dir + "/store:8MiB"}
			both := append(slices.Clone(args), origins...)
			show := func(key string) string {
				t.Helper()
				return fmt.Sprint(d.json("device", "show", "vdb")[0][key])
			}
			generation := func() string {
				t.Helper()
				return fmt.Sprint(d.json("device", "show", "vdb")[0]["cbt"].(map[string]any)["generation"])
			}
			d.startPlain(both...)
			d.blksnap("snapshot", "create", "s1")
			was := generation()
			d.kill()
			files := filepath.Join(d.runDir, "devices", "vdb")
			if err := os.Chmod(files, 0); err != nil {
				t.Fatal(err)
			}
			if absent {
				d.startPlain(append(args, origins[0])...)
			} else {
				d.startPlain(both...)
				if got := show("state"); !strings.HasPrefix(got, "ok, in memory only: ") || !strings.Contains(got, "permission denied") {
					t.Errorf("state: got %s, want in memory only, and why", got)
				}
				stampLive(t, d, "vdb", 0, 2)
			}
			if got := fmt.Sprint(d.json("snapshot", "show", "s1")[0]["state"]); !strings.HasPrefix(got, "failed: ") {
				t.Errorf("state of the snapshot: got %s, want failed", got)
			}
			d.blksnap("state", "check")
			d.kill()
			if err := os.Chmod(files, 0o700); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			d.startPlain(both...)
			if got := show("state"); got != "ok" {
				t.Errorf("state: got %s, want ok", got)
			}
			if generation() == was {
				t.Error("the generation of before goes on")
			}
			if images := fmt.Sprint(d.json("snapshot", "show", "s1")[0]["images"]); strings.Contains(images, "vdb") {
				t.Errorf("images of before: %s", images)
			}
		})
	}
}
