package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestSnapshotTakeDestroy takes and destroys snapshots by mkdir and rmdir.
func TestSnapshotTakeDestroy(t *testing.T) {
	src := newFakeSource()
	src.add("vda", bytes.Repeat([]byte{1}, 8192))
	_, dir := mountFake(t, src)
	snaps := filepath.Join(dir, "snapshots")
	mkdir := func(name string) error { return os.Mkdir(filepath.Join(snaps, name), 0o755) }
	rmdir := func(name string) error { return syscall.Rmdir(filepath.Join(snaps, name)) }
	list := func(want string) {
		t.Helper()
		if got := run(t, snaps, "ls -1 --quoting-style=literal | tr '\\n' ' '; readlink latest || true"); got != want {
			t.Errorf("snapshots\n got %q\nwant %q", got, want)
		}
	}
	ok := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}

	list("")
	ok("mkdir b", mkdir("b"))
	list("b latest b\n")
	ok("mkdir a", mkdir("a"))
	list("a b latest a\n")
	wantErrno(t, "mkdir again", mkdir("a"), syscall.EEXIST)
	wantErrno(t, "mkdir latest", mkdir("latest"), syscall.EEXIST)
	wantErrno(t, "mkdir of a bad name", mkdir("bad,name"), syscall.EINVAL)
	wantErrno(t, "mkdir without space", mkdir("full"), syscall.ENOSPC)
	wantErrno(t, "mkdir that fails otherwise", mkdir("odd"), syscall.EIO)
	wantErrno(t, "rmdir unknown", rmdir("none"), syscall.ENOENT)
	wantErrno(t, "rmdir latest", rmdir("latest"), syscall.ENOTDIR)

	f := open(t, filepath.Join(snaps, "a/vda.img"))
	wantErrno(t, "rmdir in use", rmdir("a"), syscall.EBUSY)
	f.Close()
	eventually(t, "rmdir after close", func() error { return rmdir("a") })
	list("b latest b\n")
	ok("rmdir b", rmdir("b"))
	list("")
	wantErrno(t, "mkdir latest", mkdir("latest"), syscall.EINVAL)
}

// eventually calls f until it succeeds: a file is released a moment after it was
// closed.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// TestRefusals does to the tree what it does not offer. Nothing changes.
func TestRefusals(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192))
	src.Take("one")
	_, dir := mountFake(t, src)
	before := run(t, dir, "find . | sort")
	for _, tc := range []struct{ command, want string }{
		{"rm version", "Operation not permitted"},
		{"rm -r snapshots/one", "Operation not permitted"},
		{"rm snapshots/latest", "Operation not permitted"},
		{"rm snapshots/one/vda.img", "Operation not permitted"},
		{"rmdir devices/vda", "Operation not permitted"},
		{"rmdir snapshots/one/vda.cbt", "Operation not permitted"},
		{"mkdir new", "Operation not permitted"},
		{"mkdir devices/vdb", "Operation not permitted"},
		{"mkdir snapshots/one/vda.new", "Operation not permitted"},
		{"touch new", "Operation not permitted"},
		{"touch version", "Read-only file system"},
		{"touch -h snapshots/latest", "Operation not permitted"},
		{"touch snapshots/one", "Operation not permitted"},
		{"echo x > new", "Operation not permitted"},
		{"echo x > version", "Read-only file system"},
		{"echo x >> devices/vda/cbt/since/all", "Read-only file system"},
		{"echo x >> devices/vda/cbt/map", "Read-only file system"},
		{"echo x > snapshots/one/vda.img", "Read-only file system"},
		{"truncate -s 0 snapshots/one/vda.img", "Read-only file system"},
		{"chmod 644 snapshots/one/vda.img", "Operation not permitted"},
		{"chown 1:1 version", "Operation not permitted"},
		{"mv version old", "Operation not permitted"},
		{"mv snapshots/one snapshots/two", "Operation not permitted"},
		{"ln version new", "Operation not permitted"},
		{"ln -s version new", "Operation not permitted"},
		{"mknod new p", "Operation not permitted"},
		{"cat none", "No such file or directory"},
		{"cat snapshots/one/vdb.img", "No such file or directory"},
		{"cat snapshots/one/vda", "No such file or directory"},
		{"cat snapshots/one/.img", "No such file or directory"},
		{"cat snapshots", "Is a directory"},
	} {
		_, stderr, err := try(t, dir, "%s", tc.command)
		if err == nil || !strings.Contains(stderr, tc.want) {
			t.Errorf("%s\n got %v %q\nwant %q", tc.command, err, stderr, tc.want)
		}
	}
	if after := run(t, dir, "find . | sort"); after != before {
		t.Errorf("the tree\n got %s\nwant %s", after, before)
	}
}

// TestDeviceNamesWithDots has devices whose names look like the files of others.
func TestDeviceNamesWithDots(t *testing.T) {
	src := newFakeSource()
	names := []string{"a", "a.img", "a.cbt", "a.state", "a.qcow2", "created", "state", "a.b.c"}
	for i, name := range names {
		src.add(name, bytes.Repeat([]byte{byte('0' + i)}, 512))
	}
	src.Take("one")
	_, dir := mountFake(t, src)
	for i, name := range names {
		want := strings.Repeat(string(rune('0'+i)), 512) + "ok\n1\n"
		got := run(t, dir+"/snapshots/one", "cat %s.img %s.state %s.cbt/number", name, name, name)
		if got != want {
			t.Errorf("image, state and number of %s\n got %q\nwant %q", name, got, want)
		}
		// The last cluster of the full one is the image, that of the increment
		// is no data.
		run(t, dir+"/snapshots/one", "tail -c 65536 %s.qcow2 | cmp -n 512 - %s.img && ! cmp -s -n 512 %s@1.qcow2 %s.qcow2", name, name, name, name)
	}
	if got := strings.Count(run(t, dir, "ls snapshots/one"), "\n"); got != 2+5*len(names) {
		t.Errorf("files of the snapshot: got %d, want %d", got, 2+5*len(names))
	}
}

// TestNameUsedAgain destroys a snapshot and takes another by the same name, over
// and over, in each way that it can be done. Nothing of the old one shows in the
// new one: not its bytes, read or mapped, not its size, not its times.
func TestNameUsedAgain(t *testing.T) {
	need(t, "/usr/bin/python3")
	src := newFakeSource()
	vda := src.add("vda", nil)
	_, dir := mountFake(t, src)
	snap := filepath.Join(dir, "snapshots/again")
	image := filepath.Join(snap, "vda.img")
	seen := map[uint64]int{}

	for i := range 24 {
		content := bytes.Repeat([]byte{byte(i + 1)}, 8192+4096*(i%3))
		vda.mu.Lock()
		vda.content = content
		vda.mu.Unlock()
		if i%2 == 0 {
			if err := os.Mkdir(snap, 0o755); err != nil {
				t.Fatal(err)
			}
		} else if err := src.Take("again"); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(image)
		if err != nil {
			t.Fatal(err)
		}
		made, _ := src.Snapshot("again")
		if fi.Size() != int64(len(content)) || !fi.ModTime().Equal(made.Created()) {
			t.Errorf("round %d: stat says %d bytes, %v, want %d, %v", i, fi.Size(), fi.ModTime(), len(content), made.Created())
		}
		ino := fi.Sys().(*syscall.Stat_t).Ino
		if j, ok := seen[ino]; ok {
			t.Errorf("round %d: inode %d was that of round %d", i, ino, j)
		}
		seen[ino] = i
		if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, content) {
			t.Errorf("round %d: read %d bytes of %d, error %v, want %d of %d", i, len(got), got[0], err, len(content), i+1)
		}
		mapped := run(t, dir, `/usr/bin/python3 -c 'import mmap
f = open("snapshots/again/vda.img", "rb")
m = mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
print(len(m), set(m[:]))'`)
		if want := fmt.Sprintf("%d {%d}\n", len(content), i+1); mapped != want {
			t.Errorf("round %d: mapped\n got %s\nwant %s", i, mapped, want)
		}
		if i%4 < 2 {
			eventually(t, "rmdir", func() error { return syscall.Rmdir(snap) })
		} else {
			src.force("again")
		}
		if _, err := os.Stat(image); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("round %d: stat after destroy: %v, want %v", i, err, os.ErrNotExist)
		}
	}
}

// TestDestroyedWhileOpen destroys a snapshot of which a file is open, and one in
// which somebody stands.
func TestDestroyedWhileOpen(t *testing.T) {
	src := newFakeSource()
	src.add("vda", bytes.Repeat([]byte{1}, 1<<20))
	src.Take("one")
	_, dir := mountFake(t, src)
	name := filepath.Join(dir, "snapshots/one")
	inside := open(t, name)
	f := open(t, filepath.Join(name, "vda.img"))
	p := make([]byte, 4096)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}

	src.force("one")
	_, err := f.ReadAt(p, 0)
	wantErrno(t, "read of what was read before", err, syscall.EIO)
	_, err = f.ReadAt(p, 8192)
	wantErrno(t, "read of what was not", err, syscall.EIO)
	if fi, err := f.Stat(); err != nil || fi.Size() != 1<<20 {
		t.Errorf("stat of the open file: %v", err)
	}
	_, err = os.Open(filepath.Join(name, "vda.img"))
	wantErrno(t, "open by name", err, syscall.ENOENT)
	_, err = os.Open(fmt.Sprintf("/proc/self/fd/%d/vda.img", inside.Fd()))
	if err == nil {
		t.Error("open from inside succeeds")
	}
	_, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	wantErrno(t, "open again", err, syscall.EIO)

	// The same name again: the old file goes on to answer EIO.
	src.Take("one")
	_, err = f.ReadAt(p, 0)
	wantErrno(t, "read after the name was used again", err, syscall.EIO)
	if _, err := open(t, filepath.Join(name, "vda.img")).ReadAt(p, 0); err != nil {
		t.Errorf("read of the new image: %v", err)
	}
}

// TestOthersGoOnWhileTaking holds a snapshot in the middle of being taken by
// mkdir. Whatever needs not the directory of snapshots itself goes on.
func TestOthersGoOnWhileTaking(t *testing.T) {
	src := newFakeSource()
	src.add("vda", bytes.Repeat([]byte{1}, 1<<20))
	src.Take("one")
	entered, release := make(chan struct{}), make(chan struct{})
	src.taking = func() { close(entered); <-release }
	_, dir := mountFake(t, src)
	image := open(t, filepath.Join(dir, "snapshots/one/vda.img"))

	made := make(chan error, 1)
	go func() { made <- os.Mkdir(filepath.Join(dir, "snapshots/two"), 0o755) }()
	wait(t, "Take", entered)
	run(t, dir, "timeout 20 cat devices/vda/state devices/vda/cbt/since/all version > /dev/null")
	run(t, dir, "timeout 20 df . > /dev/null")
	run(t, dir, "timeout 20 cat snapshots/one/vda.state snapshots/one/vda.cbt/number > /dev/null")
	if _, err := image.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("read of an image: %v", err)
	}
	select {
	case err := <-made:
		t.Errorf("mkdir returns before its snapshot is taken: %v", err)
	default:
	}
	close(release)
	if err := <-made; err != nil {
		t.Errorf("mkdir: %v", err)
	}
	run(t, dir, "cat snapshots/two/vda.img > /dev/null")
}

// TestLiveLines changes what a file of one line says, while it is open and not.
func TestLiveLines(t *testing.T) {
	src := newFakeSource()
	vda := src.add("vda", make([]byte, 8192))
	_, dir := mountFake(t, src)
	name := filepath.Join(dir, "devices/vda/state")
	say := func(s string) {
		vda.mu.Lock()
		vda.state = s
		vda.mu.Unlock()
	}
	times := map[time.Time]string{}
	read := func(want string) {
		t.Helper()
		f := open(t, name)
		checkContent(t, want, f, want)
		f.Close()
		fi, err := os.Stat(name)
		if err != nil || fi.Size() != int64(len(want)) {
			t.Errorf("stat: %d bytes, error %v, want %d", fi.Size(), err, len(want))
		}
		if was, ok := times[fi.ModTime()]; ok && was != want {
			t.Errorf("%q has the time that %q had", want, was)
		}
		times[fi.ModTime()] = want
	}

	read("ok\n")
	say("failed: origin gone")
	read("failed: origin gone\n")
	say("failed: two\nlines")
	read("failed: two lines\n")
	say("stopping")
	f := open(t, name)
	say("ok")
	read("ok\n")
	checkContent(t, "opened before", f, "stopping\n")
	say("stopping")
	read("stopping\n")
}

// TestLiveStates breaks an image and its snapshot: the states in the snapshot's
// directory say so, which the kernel had seen before.
func TestLiveStates(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192))
	src.Take("one")
	_, dir := mountFake(t, src)
	check := func(want string) {
		t.Helper()
		if got := run(t, dir+"/snapshots/one", "stat -c %%s state vda.state; cat state vda.state"); got != want {
			t.Errorf("sizes of the states, and what they say\n got %q\nwant %q", got, want)
		}
	}
	check("3\n3\nok\nok\n")
	broken := "overflowed"
	snap := src.snaps["one"]
	snap.state.Store(&broken)
	snap.images["vda"].destroyed.Store(true)
	check("11\n18\noverflowed\nfailed: destroyed\n")
}

// TestMapGrows resizes the device under an open map.
func TestMapGrows(t *testing.T) {
	src := newFakeSource()
	vda := src.add("vda", make([]byte, 8192))
	vda.set(manyRuns(100))
	_, dir := mountFake(t, src)
	name := filepath.Join(dir, "devices/vda/cbt/map")
	f := open(t, name)
	same := open(t, name)
	vda.set(manyRuns(300))
	checkContent(t, "opened before", f, strings.Repeat("\x00\x02", 100))
	checkContent(t, "opened after", open(t, name), strings.Repeat("\x00\x02", 300))
	_, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", same.Fd()))
	wantErrno(t, "open the old map again", err, syscall.ESTALE)
	checkContent(t, "opened before, later", same, strings.Repeat("\x00\x02", 100))
}

// TestMapIsCopiedAgain copies a map by rsync, which compares size and time (with
// -1 to the nanosecond), each time after the map has changed.
func TestMapIsCopiedAgain(t *testing.T) {
	need(t, "rsync")
	src := newFakeSource()
	vda := src.add("vda", make([]byte, 1<<20))
	_, dir := mountFake(t, src)
	tmp := t.TempDir()
	for i := range int64(4) {
		vda.write([]byte{1}, i*65536)
		run(t, dir, "rsync -a --modify-window=-1 devices/vda/cbt/map %s/copy", tmp)
		got, err := os.ReadFile(tmp + "/copy")
		if want := vda.Changes().(*fakeChanges).m; err != nil || !bytes.Equal(got, want) {
			t.Errorf("copy %d\n got %v %v\nwant %v", i, got, err, want)
		}
	}
}

// TestDevicesComeAndGo removes a device and adds another by its name.
func TestDevicesComeAndGo(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192))
	_, dir := mountFake(t, src)
	size := open(t, filepath.Join(dir, "devices/vda/size"))
	if got, want := run(t, dir, "cat devices/vda/size"), "8192\n"; got != want {
		t.Errorf("size\n got %q\nwant %q", got, want)
	}
	src.remove("vda")
	_, err := os.Stat(filepath.Join(dir, "devices/vda/size"))
	wantErrno(t, "stat of a removed device", err, syscall.ENOENT)
	if got := run(t, dir, "ls devices"); got != "" {
		t.Errorf("ls devices\n got %q\nwant nothing", got)
	}
	src.add("vda", make([]byte, 12288))
	if got, want := run(t, dir, "cat devices/vda/size"), "12288\n"; got != want {
		t.Errorf("size\n got %q\nwant %q", got, want)
	}
	checkContent(t, "opened before", size, "8192\n")
}

// TestConcurrentUse reads everything from many goroutines while snapshots come
// and go in all ways. Whoever opens an image reads its bytes or an error.
func TestConcurrentUse(t *testing.T) {
	t.Logf("repeat with -seed=%d", *seed)
	src := newFakeSource()
	vda := src.add("vda", bytes.Repeat([]byte{1}, 64<<10))
	_, dir := mountFake(t, src)
	stop := time.Now().Add(3 * time.Second)
	name := func(rng *rand.Rand) string { return fmt.Sprintf("s%d", rng.IntN(4)) }
	var wg sync.WaitGroup
	var reads, denials int
	var mu sync.Mutex

	for worker := range 8 {
		rng := rand.New(rand.NewPCG(*seed, uint64(worker)))
		wg.Go(func() {
			for time.Now().Before(stop) {
				switch snap := name(rng); worker {
				case 0:
					os.Mkdir(filepath.Join(dir, "snapshots", snap), 0o755)
				case 1:
					syscall.Rmdir(filepath.Join(dir, "snapshots", snap))
				case 2:
					vda.mu.Lock()
					vda.content = bytes.Repeat([]byte{byte(rng.Uint32())}, 64<<10)
					vda.mu.Unlock()
					src.Take(snap)
					src.Destroy(name(rng))
				case 3:
					filepath.Walk(dir, func(string, os.FileInfo, error) error { return nil })
				case 4:
					os.Readlink(filepath.Join(dir, "snapshots/latest"))
					os.ReadFile(filepath.Join(dir, "devices/vda/cbt/since/all"))
					os.ReadFile(filepath.Join(dir, "snapshots/latest/vda.cbt/map"))
				default:
					f, err := os.Open(filepath.Join(dir, "snapshots", snap, "vda.img"))
					if err != nil {
						continue
					}
					p, err := io.ReadAll(f)
					f.Close()
					mu.Lock()
					if err != nil {
						denials++
					} else {
						reads++
					}
					mu.Unlock()
					if err == nil && (len(p) != 64<<10 || bytes.Count(p, p[:1]) != len(p)) {
						t.Errorf("image %s has %d bytes, or bytes of another", snap, len(p))
					}
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d images read, %d reads denied", reads, denials)
	if reads == 0 {
		t.Error("no image was ever read")
	}
}
