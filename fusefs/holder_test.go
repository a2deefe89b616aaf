package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// TestMayServe asks who has the connection of a tree open.
func TestMayServe(t *testing.T) {
	needRoot(t, "only root can mount what it wants")
	need(t, "/dev/fuse")
	dir, f := mountFile(t, fsType)
	m, ok, err := mountAt(dir)
	if err != nil || !ok {
		t.Fatalf("what is mounted on %s: %v, %v", dir, ok, err)
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	_, told := connection(info)
	holder := sleeps(t, f)
	ask := func(name string, pid int, want bool) {
		t.Helper()
		if got := mayServe(pid, m.dev); got != want {
			t.Errorf("%s may serve it: %v, want %v", name, got, want)
		}
	}
	ask("who has it", os.Getpid(), true)
	ask("who has it too", holder, true)
	ask("another process", sleeps(t), false)
	ask("a process that has ended", 1<<30, false)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, other := mountFile(t, fsType)
	defer other.Close()
	ask("who has another one", os.Getpid(), !told)
	ask("the last who has it", holder, true)
}

// TestMayServeUnseen asks about a process that was killed and closes its files, of which
// one holds it up: nobody is shown which others it still has.
func TestMayServeUnseen(t *testing.T) {
	needRoot(t, "only root can mount what it wants")
	need(t, "/dev/fuse")
	h := &heldFlush{entered: make(chan struct{}), release: make(chan struct{})}
	dir := t.TempDir()
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMount: true}, OnAdd: func(ctx context.Context) {
		root.AddChild("file", root.NewPersistentInode(ctx, h, fs.StableAttr{Mode: fuse.S_IFREG}), false)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	})
	f, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	dead := sleeps(t)
	pid := sleeps(t, f)
	release := sync.OnceFunc(func() { close(h.release) })
	t.Cleanup(release)
	f.Close()
	h.hold.Store(true)
	if err := errors.Join(syscall.Kill(dead, syscall.SIGKILL), syscall.Kill(pid, syscall.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	<-h.entered
	const none = "0:0"
	if !mayServe(pid, none) {
		t.Error("a process whose files are not shown does not serve, want that it may")
	}
	release()
	// Nobody waits for these processes yet.
	for _, pid := range []int{dead, pid} {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
		if mayServe(pid, none) {
			t.Error("a process that is dead may serve, want that it does not")
		}
	}
}

// heldFlush is a file that, while hold is set, nobody closes before release.
type heldFlush struct {
	fs.Inode
	hold             atomic.Bool
	entered, release chan struct{}
}

func (h *heldFlush) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (h *heldFlush) Flush(context.Context, fs.FileHandle) syscall.Errno {
	if h.hold.Load() {
		close(h.entered)
		<-h.release
	}
	return 0
}

// sleeps starts a process that has files open, and returns its id.
func sleeps(t *testing.T, files ...*os.File) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "3600")
	cmd.ExtraFiles = files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd.Process.Pid
}
