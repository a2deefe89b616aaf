package fusefs

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// mountFake mounts src, which tells the tree what is gone.
func mountFake(t testing.TB, src *fakeSource, change ...func(*Options)) (*Tree, string) {
	t.Helper()
	tree, dir := mountSource(t, src, change...)
	src.mu.Lock()
	defer src.mu.Unlock()
	src.tree = tree
	return tree, dir
}

// mounted counts the trees that are mounted by mountSource.
var mounted atomic.Int32

// mountSource mounts src and unmounts it when the test ends, which must leave no
// mount, no buffer in use and, when it was the last tree, no goroutine: the readers
// of another come and go while it is asked.
func mountSource(t testing.TB, src Source, change ...func(*Options)) (*Tree, string) {
	t.Helper()
	need(t, "/dev/fuse")
	before := goleak.IgnoreCurrent()
	o := Options{Dir: t.TempDir(), Log: testLog(t)}
	for _, c := range change {
		c(&o)
	}
	tree, err := Mount(t.Context(), src, o)
	if err != nil {
		t.Fatal(err)
	}
	mounted.Add(1)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := tree.Unmount(ctx); err != nil {
			t.Errorf("at the end of the test: %v", err)
		}
		if _, ok, err := mountAt(tree.Dir()); ok || err != nil {
			t.Errorf("after unmount: mounted %v, error %v", ok, err)
			unmountAll(t, tree.Dir())
		}
		if got := len(tree.readers.buffers.free); got != bufferCount {
			t.Errorf("after unmount: %d buffers are free, want %d", got, bufferCount)
		}
		if mounted.Add(-1) > 0 {
			return
		}
		if err := goleak.Find(before); err != nil {
			t.Error(err)
		}
	})
	return tree, tree.Dir()
}

// testLog sends what the tree logs to the test's log.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// need skips the test visibly where a file or program that it needs is missing;
// under CI that is a failure.
func need(t testing.TB, things ...string) {
	t.Helper()
	for _, thing := range things {
		_, err := os.Stat(thing)
		if !filepath.IsAbs(thing) {
			_, err = exec.LookPath(thing)
		}
		if err == nil {
			continue
		}
		lacking(t, fmt.Sprintf("missing: %v", err))
	}
}

// needRoot is need for who must be root to do what a test does.
func needRoot(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		lacking(t, why)
	}
}

func lacking(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// run runs a shell command in dir and returns its output, which it has to make
// without a word on stderr.
func run(t testing.TB, dir, format string, args ...any) string {
	t.Helper()
	out, stderr, err := try(t, dir, format, args...)
	if err != nil || stderr != "" {
		t.Fatalf("%s: %v\nstdout %s\nstderr %s", fmt.Sprintf(format, args...), err, out, stderr)
	}
	return out
}

// try runs a shell command that may fail.
func try(t testing.TB, dir, format string, args ...any) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	// The shell changes the directory, not the fork: that could wait for our
	// own tree.
	cmd := exec.CommandContext(ctx, "bash", "-c", "cd '"+dir+"' && "+fmt.Sprintf(format, args...))
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var o, e strings.Builder
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

// TestFiles reads every file of a tree with one device and one snapshot.
func TestFiles(t *testing.T) {
	src := newFakeSource()
	vda := src.add("vda", make([]byte, 200<<10))
	vda.write([]byte("x"), 70<<10)
	_, dir := mountFake(t, src)
	run(t, dir, "mkdir snapshots/one")
	vda.write([]byte("y"), 130<<10)
	snap, _ := src.Snapshot("one")
	created := snap.Created().UTC().Format("2006-01-02T15:04:05.000000000Z")

	got := run(t, dir, `find . -type f ! -name '*.img' ! -name '*.qcow2' ! -name map | sort | while read f; do echo $f: $(cat $f); done`)
	want := `./devices/vda/cbt/base: 0
./devices/vda/cbt/block_size: 65536
./devices/vda/cbt/generation: 9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60
./devices/vda/cbt/number: 1
./devices/vda/cbt/since/1: 131072 65536 data
./devices/vda/cbt/since/all: 0 204800 data
./devices/vda/origin: /srv/vda.img
./devices/vda/size: 204800
./devices/vda/state: ok
./devices/vda/uri: nbd+unix:///vda?socket=/run/nbd.sock
./snapshots/one/created: ` + created + `
./snapshots/one/state: ok
./snapshots/one/vda.cbt/base: 0
./snapshots/one/vda.cbt/block_size: 65536
./snapshots/one/vda.cbt/generation: 9b2f6c8e-35a7-4a54-8e8f-3f1b5a4c7d60
./snapshots/one/vda.cbt/number: 1
./snapshots/one/vda.cbt/since/1:
./snapshots/one/vda.cbt/since/all: 0 204800 data
./snapshots/one/vda.state: ok
./version: blksnap 0.0.0
`
	if got != want {
		t.Errorf("the tree's files\n got %s\nwant %s", got, want)
	}
	for file, want := range map[string]string{
		"devices/vda/cbt/map":       " 00 01 02 00\n",
		"snapshots/one/vda.cbt/map": " 00 01 00 00\n",
	} {
		if got := run(t, dir, "od -An -tx1 %s", file); got != want {
			t.Errorf("%s\n got %s\nwant %s", file, got, want)
		}
	}
}
