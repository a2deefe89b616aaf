// An origin whose writes wait for the test.

package test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// gatedFile is a file in this process's memory, as others see it through FUSE.
type gatedFile struct {
	fs.Inode

	entered chan struct{} // gets a value from each write that waits
	slow    atomic.Int64  // how long each write takes at least, in ns

	mu   sync.Mutex
	data []byte
	gate chan struct{} // writes wait until it is closed; nil: they do not
}

// gatedOrigin returns the path of a file of size zeroes, and the file.
func gatedOrigin(t *testing.T, size int64) (string, *gatedFile) {
	t.Helper()
	f := &gatedFile{data: make([]byte, size), entered: make(chan struct{}, 1)}
	root := &fs.Inode{}
	dir := mountGate(t, root, f.open, func(ctx context.Context) {
		root.AddChild("disk.img", root.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), false)
	})
	return filepath.Join(dir, "disk.img"), f
}

// deadDir is a directory on a disk that does not answer.
type deadDir struct {
	fs.Inode
	gate chan struct{}
}

func (d *deadDir) Lookup(_ context.Context, name string, _ *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name == "below" { // others are asked for while it is mounted
		<-d.gate
	}
	return nil, syscall.ENOENT
}

// newDeadDir returns the path of a directory that does not say what is below it before
// answer is called, or the test ends.
func newDeadDir(t *testing.T) (dir string, answer func()) {
	t.Helper()
	d := &deadDir{gate: make(chan struct{})}
	answer = sync.OnceFunc(func() { close(d.gate) })
	return mountGate(t, d, answer, nil), answer
}

// mountGate mounts root, fills it, and calls open before it is unmounted again.
func mountGate(t *testing.T, root fs.InodeEmbedder, open func(), fill func(ctx context.Context)) (dir string) {
	t.Helper()
	dir = scratch(t)
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "gate", MaxWrite: 128 * kiB},
		OnAdd:        fill,
	})
	if err != nil {
		t.Fatal(err)
	}
	keepFuse(t)
	t.Cleanup(func() {
		open()
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount the gate: %v", err)
		}
		server.Wait()
	})
	return dir
}

// keepFuse keeps the connections of this process from the programs that it starts:
// go-fuse does not, and a daemon that has the connection of its own origin would keep
// it open, and wait for an answer for ever, when the tests are killed.
func keepFuse(t *testing.T) {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range open {
		if to, _ := os.Readlink("/proc/self/fd/" + e.Name()); to == "/dev/fuse" {
			fd, _ := strconv.Atoi(e.Name())
			syscall.CloseOnExec(fd)
		}
	}
}

// shut lets writes wait from now on.
func (f *gatedFile) shut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gate = make(chan struct{})
}

// open lets them go on.
func (f *gatedFile) open() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gate != nil {
		close(f.gate)
		f.gate = nil
	}
}

func (f *gatedFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o600, uint64(len(f.data))
	return 0
}

func (f *gatedFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *gatedFile) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fuse.ReadResultData(p[:copy(p, f.data[min(off, int64(len(f.data))):])]), 0
}

func (f *gatedFile) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	f.mu.Lock()
	gate := f.gate
	f.mu.Unlock()
	if gate != nil {
		select {
		case f.entered <- struct{}{}:
		default: // one is enough
		}
		<-gate
	}
	time.Sleep(time.Duration(f.slow.Load()))
	f.mu.Lock()
	defer f.mu.Unlock()
	return uint32(copy(f.data[off:], p)), 0
}

func (f *gatedFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }
