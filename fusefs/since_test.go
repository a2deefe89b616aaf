package fusefs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// manyRuns is change tracking of a device with n runs after snapshot 4.
func manyRuns(n int) *fakeChanges {
	c := &fakeChanges{
		device: int64(2*n) * 4096, block: 4096, generation: "g",
		number: 7, base: 3, numbers: []uint64{4, 7},
		m: bytes.Repeat([]byte{0, 2}, n), reads: new(atomic.Int64),
	}
	return c
}

// TestSinceNames looks up what is and what is not there.
func TestSinceNames(t *testing.T) {
	src := newFakeSource()
	src.add("vda", make([]byte, 8192)).set(manyRuns(1))
	_, dir := mountFake(t, src)
	since := filepath.Join(dir, "devices/vda/cbt/since")

	if got, want := run(t, since, "ls -a"), ".\n..\n4\n7\nall\n"; got != want {
		t.Errorf("ls\n got %q\nwant %q", got, want)
	}
	for name, there := range map[string]bool{
		"3": true, "4": true, "5": true, "7": true, "all": true,
		"2": false, "8": false, "04": false, "+4": false, "-4": false, "4 ": false, "0x4": false,
		"ALL": false, "": true, "18446744073709551616": false, "99999999999999999999999": false,
	} {
		fd, err := unix.Open(filepath.Join(since, name), unix.O_PATH, 0) // a lookup, no more
		if err == nil {
			unix.Close(fd)
		}
		if got := err == nil; got != there || err != nil && err != unix.ENOENT {
			t.Errorf("lookup of since/%s\n got %v\nwant found %v", name, err, there)
		}
		if _, err := os.Stat(filepath.Join(since, name)); (err == nil) != there {
			t.Errorf("stat of since/%s\n got %v\nwant found %v", name, err, there)
		}
	}
}

// TestSinceListingComputesNothing counts how often the runs are read, and looks
// whether a listing makes nodes.
func TestSinceListingComputesNothing(t *testing.T) {
	src := newFakeSource()
	changes := manyRuns(1000)
	src.add("vda", make([]byte, 8192)).set(changes)
	tree, dir := mountFake(t, src)
	since := filepath.Join(dir, "devices/vda/cbt/since")

	run(t, since, "ls")
	n := tree.top.EmbeddedInode()
	for _, name := range []string{"devices", "vda", "cbt", "since"} {
		n = n.GetChild(name)
	}
	if got := len(n.Children()); got != 0 {
		t.Errorf("ls made %d nodes", got)
	}
	for _, tc := range []struct {
		command string
		want    int64
	}{
		{"ls", 0},
		{"find .", 0},
		{"find . -type f", 0},
		{"stat 4", 1},
		{"cat 4 > /dev/null", 1},
		{"test -e 4", 1},
		{"cp 4 " + t.TempDir(), 2}, // it stats before it opens
	} {
		changes.reads.Store(0)
		run(t, since, "%s", tc.command)
		if got := changes.reads.Load(); got > tc.want {
			t.Errorf("%s reads the runs %d times, want %d", tc.command, got, tc.want)
		}
	}
}

// TestSinceStaysWhileOpen changes the device under open files: each goes on to
// show what it showed first, at its full length, and a new one shows what is
// new.
func TestSinceStaysWhileOpen(t *testing.T) {
	src := newFakeSource()
	vda := src.add("vda", make([]byte, 8192))
	vda.set(manyRuns(5000))
	_, dir := mountFake(t, src)
	name := filepath.Join(dir, "devices/vda/cbt/since/4")
	before := lines(t, must(manyRuns(5000).Since(4)))
	after := lines(t, must(manyRuns(70000).Since(4)))

	if fi, err := os.Stat(name); err != nil || fi.Size() != int64(len(before)) {
		t.Errorf("stat of the closed file: %v %v, want %d bytes", fi.Size(), err, len(before))
	}
	first := open(t, name)
	same := open(t, name)
	checkSize(t, "first", first, before)
	half := make([]byte, len(before)/2)
	if _, err := io.ReadFull(first, half); err != nil {
		t.Fatal(err)
	}

	vda.set(manyRuns(70000))
	second := open(t, name)
	checkSize(t, "second", second, after)
	if fi, err := os.Stat(name); err != nil || fi.Size() != int64(len(after)) {
		t.Errorf("stat by name: %v %v, want %d bytes", fi.Size(), err, len(after))
	}
	checkSize(t, "first, after stat", first, before)
	rest, err := io.ReadAll(first)
	if got := string(half) + string(rest); err != nil || got != before {
		t.Errorf("first: %d bytes, error %v, want the %d bytes as of its open", len(got), err, len(before))
	}
	checkContent(t, "same", same, before)
	checkContent(t, "second", second, after)
}

func must[T any](v T, ok bool) T {
	if !ok {
		panic("not there")
	}
	return v
}

// open opens a file and closes it when the test ends.
func open(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func checkSize(t *testing.T, what string, f *os.File, want string) {
	t.Helper()
	fi, err := f.Stat()
	if err != nil || fi.Size() != int64(len(want)) {
		t.Errorf("%s: stat says %d bytes, error %v, want %d", what, fi.Size(), err, len(want))
	}
}

func checkContent(t *testing.T, what string, f *os.File, want string) {
	t.Helper()
	checkSize(t, what, f, want)
	got, err := io.ReadAll(f)
	if err != nil || string(got) != want {
		t.Errorf("%s: read %d bytes, error %v, want %d others", what, len(got), err, len(want))
	}
}

// TestSinceTools reads a list of 131,072 lines by programs that each look at
// its size in their own way.
func TestSinceTools(t *testing.T) {
	need(t, "rsync")
	src := newFakeSource()
	changes := manyRuns(1 << 17)
	src.add("vda", make([]byte, 8192)).set(changes)
	_, dir := mountFake(t, src)
	since := filepath.Join(dir, "devices/vda/cbt/since")
	want := lines(t, must(changes.Since(4)))
	tmp := t.TempDir()
	if err := os.WriteFile(tmp+"/want", []byte(want), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{
		"cat 4 > $tmp/got",
		"cp 4 $tmp/got",
		"tar cf $tmp/tar 4 && tar xOf $tmp/tar 4 > $tmp/got",
		"rsync -a 4 $tmp/got",
		"dd if=4 of=$tmp/got bs=4093 status=none",
		"dd if=4 of=$tmp/got iflag=direct bs=64k status=none",
		"tail -n +1 4 > $tmp/got",
		"while read l; do echo $l; done < <(head -n 1000 4) | cat - <(tail -n +1001 4) > $tmp/got",
	} {
		run(t, since, "tmp=%s; rm -f $tmp/got; %s && cmp $tmp/want $tmp/got", tmp, command)
	}
	if got, want := strings.Fields(run(t, since, "wc -lc 4")), []string{"131072", strconv.Itoa(len(want)), "4"}; strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("wc -lc\n got %v\nwant %v", got, want)
	}
}

// TestSinceErrors makes reading the runs fail: the open does.
func TestSinceErrors(t *testing.T) {
	src := newFakeSource()
	changes := manyRuns(10)
	changes.fail = errors.New("origin fails")
	vda := src.add("vda", make([]byte, 8192))
	vda.set(changes)
	tree, dir := mountFake(t, src)
	name := filepath.Join(dir, "devices/vda/cbt/since/4")

	_, err := os.Open(name)
	wantErrno(t, "open after a failed read", err, syscall.EIO)
	_, err = os.Stat(name)
	wantErrno(t, "stat after a failed read", err, syscall.EIO)

	vda.set(manyRuns(10))
	tree.contents.used.Store(contentLimit)
	_, err = os.Open(name)
	wantErrno(t, "open beyond the limit of memory", err, syscall.ENOMEM)
	tree.contents.used.Store(0)
	checkContent(t, "after the errors", open(t, name), lines(t, must(manyRuns(10).Since(4))))

	_, err = os.OpenFile(name, os.O_RDWR, 0)
	wantErrno(t, "open for writing", err, syscall.EROFS)
}

func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s\n got %v\nwant %v", what, err, want)
	}
}
