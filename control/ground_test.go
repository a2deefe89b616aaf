package control

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// hangingFile is a file of a FUSE file system, like the one of nbdfuse over one
// of our exports: reads wait while nobody serves it.
type hangingFile struct {
	fs.Inode
	gate atomic.Pointer[chan struct{}] // reads wait for it; nil: they do not
}

const hangingSize = 1 << 20

func (f *hangingFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o600, hangingSize
	return 0
}

func (f *hangingFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (f *hangingFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if gate := f.gate.Load(); gate != nil {
		<-*gate
	}
	return fuse.ReadResultData(bytes.Repeat([]byte{0}, int(min(int64(len(dest)), max(0, hangingSize-off))))), 0
}

// mountHanging mounts a file system with a hanging file and returns its path.
func mountHanging(t *testing.T) (*hangingFile, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		lacking(t, "needs root")
	}
	dir := t.TempDir()
	f := &hangingFile{}
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "nbdfuse"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("nbd", root.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), false)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
		server.Wait()
	})
	return f, filepath.Join(dir, "nbd")
}

// attachLoop attaches a loop device to the file at path until the test ends.
func attachLoop(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "losetup", "--find", "--show", path).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		lacking(t, "needs losetup")
	}
	if err != nil {
		t.Fatalf("attach loop device: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// TestGround looks at paths that stand on a file that is served, and on one
// that is not.
func TestGround(t *testing.T) {
	f, file := mountHanging(t)
	loop := attachLoop(t, file)
	for _, tc := range []struct{ name, path string }{
		{"file of a FUSE file system", file},
		{"loop device on it", loop},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := checkGround(t.Context(), "snapstore", tc.path, probeRead); err != nil {
				t.Errorf("snapstore on what is served: %v", err)
			}
			gate := make(chan struct{})
			f.gate.Store(&gate)
			defer func() {
				f.gate.Store(nil)
				close(gate)
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			err := checkGround(ctx, "snapstore", tc.path, probeRead)
			wantError(t, "snapstore on what is not served", err,
				"snapstore "+tc.path+": it stands on "+file+", which does not answer while we do not: is that one of our own exports?")
		})
	}
}

func TestGroundThatIsFirm(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct{ name, path string }{
		{"directory", dir},
		{"what does not exist yet", filepath.Join(dir, "a", "b", "c")},
		{"file", makeOrigin(t, 4096)},
		{"memory", "/dev/shm/blksnap"},
		{"kernel", "/proc/self/x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := checkGround(t.Context(), "state directory", tc.path, probeRead); err != nil {
				t.Error(err)
			}
		})
	}
}
