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

// A part of the snapstore that is missing at one start and is back at the next: images
// that needed it are failed, and stay so, whatever the part holds; the others are right
// all the while, and so are those that come later, in the part as well.
func TestPartMissingAtAStart(t *testing.T) {
	needRoot(t)
	const size, small = 4 * miB, miB
	for _, tc := range []struct {
		name    string
		end     func(d *daemon)
		missing func(t *testing.T, part string) // what becomes of the part's file
		named   bool                            // by the start without it
	}{
		{"not named, stopped", (*daemon).stop, func(*testing.T, string) {}, false},
		{"not named, killed", (*daemon).kill, func(*testing.T, string) {}, false},
		{"removed, stopped", (*daemon).stop, func(t *testing.T, part string) { run(t, "mv", part, part+".kept") }, true},
		{"removed, killed", (*daemon).kill, func(t *testing.T, part string) { run(t, "mv", part, part+".kept") }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := scratch(t)
			part := filepath.Join(dir, "first")
			first, second := fmt.Sprintf("file:%s:%d", part, small), "file:"+dir+"/second:64MiB"
			a, b := makeOrigin(t, dir, "vda", size), makeOrigin(t, dir, "vdb", size)
			d := serve(t, a, b, "--store", first, "--store", second)
			overwrite := func(name string, n int64, pass uint64) {
				t.Helper()
				live, p := d.open(name), make([]byte, n)
				defer live.Close()
				Stamp(p, name, 0, pass)
				if err := live.writeAt(p, 0); err != nil {
					t.Fatal(err)
				}
			}
			const lost = "failed: blocks that it needs are lost: part 1 of the snapstore is not there"
			wantImage := func(when, snapshot, name string, pass uint64) {
				t.Helper()
				path := d.snapshot(snapshot, name+".img")
				image, err := os.ReadFile(path)
				if pass == 0 {
					if state := read(t, d.snapshot(snapshot, name+".state")); state != lost || !errors.Is(err, syscall.EIO) {
						t.Errorf("%s, %s@%s: %s, read with error %v\nwant %s, and EIO", when, name, snapshot, state, err, lost)
					}
					return
				}
				if err == nil {
					err = Verify(image[:size/2], name, 0, pass, pass)
				}
				if err != nil {
					t.Errorf("%s, %s@%s: %v", when, name, snapshot, err)
				}
			}
			generation := read(t, d.device("vda", "cbt", "generation"))
			mkdir(t, d.snapshot("old"))
			overwrite("vda", size/2, 2) // fills the first part, and goes on in the second
			overwrite("vdb", size/2, 2)
			wantImage("at first", "old", "vda", 1)
			tc.end(d)

			tc.missing(t, part)
			args := []string{a, b, "--store", second}
			if tc.named {
				args = []string{a, b, "--store", first, "--store", second}
			}
			d.start(args...)
			wantImage("without the part", "old", "vda", 0)
			wantImage("without the part", "old", "vdb", 1)
			for _, says := range []string{"a part of the snapstore is not there any more", "snapshot=old", lost[len("failed: "):]} {
				if !strings.Contains(d.stderr.String(), says) {
					t.Errorf("the log does not say %q", says)
				}
			}
			if events := d.blksnap("events"); !strings.Contains(events, lost[len("failed: "):]) {
				t.Errorf("no event says why the snapshot is lost:\n%s", events)
			}
			mkdir(t, d.snapshot("mid"))
			overwrite("vda", size/2, 3)
			tc.end(d)

			if tc.named {
				run(t, "mv", part+".kept", part)
			}
			d.start(a, b, "--store", first, "--store", second)
			back := "when the part is back"
			mkdir(t, d.snapshot("new"))
			overwrite("vda", size/2, 4) // into the part as well
			if !tc.named {
				wantImage(back, "mid", "vda", 2)
			} else if got := read(t, d.snapshot("mid", "vda.state")); !strings.HasPrefix(got, "failed: ") { // it was in the file that is gone now
				t.Errorf("state of an image in a file that was replaced\n got %s\nwant failed", got)
			}
			wantImage(back, "old", "vda", 0)
			wantImage(back, "old", "vdb", 1)
			wantImage(back, "mid", "vdb", 2)
			wantImage(back, "new", "vda", 3)
			if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
				t.Error("a part of the snapstore costs the generation")
			}
			if out := d.blksnap("state", "check"); out != "" {
				t.Errorf("state check: %s", out)
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

// A run directory that is full: no snapshot can be taken, and that says where there is no
// room; everything else goes on, also over a kill, and is sound.
func TestFullRunDirectory(t *testing.T) {
	needRoot(t)
	runDir := tmpfs(t, "size=1500k,mode=700")
	d := newDaemon(t, nil)
	d.runDir = runDir
	d.env = append(d.env, "BLKSNAP_CONTROL="+filepath.Join(runDir, "control.sock"))
	const size = 4 * miB
	origin := makeOrigin(t, d.dir, "vda", size)
	d.start(origin)
	mkdir(t, d.snapshot("s1"))
	number := read(t, d.snapshot("s1", "vda.cbt", "number"))
	fill, err := os.Create(filepath.Join(runDir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for n := 4 * kiB; err == nil; {
		_, err = fill.Write(make([]byte, n))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}

	if err := os.Mkdir(d.snapshot("s2"), 0o700); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("mkdir of a snapshot: got %v, want ENOSPC", err)
	}
	r := d.try("snapshot", "create", "s3")
	if want := "grow " + filepath.Join(runDir, "devices", "vda", "layer-1"); r.status != 1 || !strings.Contains(r.stderr, want) {
		t.Errorf("snapshot create\n got status %d, %s\nwant 1, %s", r.status, r.stderr, want)
	}
	p := make([]byte, size)
	Stamp(p, "vda", 0, 2)
	if err := d.open("vda").writeAt(p, 0); err != nil {
		t.Error(err)
	}
	for _, when := range []string{"served", "killed and started again"} {
		if r := d.try("state", "check"); r.status != 0 {
			t.Errorf("%s: %s%s", when, r.stdout, r.stderr)
		}
		image, err := os.ReadFile(d.snapshot("s1", "vda.img"))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(Verify(image[:size/2], "vda", 0, 1, 1), Verify(image[size/2:], "vda", size/2, 0, 0)); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if got, want := read(t, d.device("vda", "cbt", "since", number)), fmt.Sprintf("0 %d data", size); got != want {
			t.Errorf("%s: changed since the snapshot\n got %q\nwant %q", when, got, want)
		}
		if when == "served" {
			d.kill()
			d.start(origin)
		}
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
		{"a store more, on a device that is not there", append(slices.Clone(right), "--store", "dev:"+dir+"/absent"), "absent"},
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
