// Mounting and serving the tree.

package fusefs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Options say where and for whom the tree is mounted.
type Options struct {
	// Dir is where the tree is mounted.
	Dir string

	// Create makes Dir if it does not exist.
	Create bool

	// AllowOther lets other users use the tree, as far as the modes of its
	// files allow: they can list it and read all but images, and take or
	// destroy nothing. The superuser can do all. An unprivileged mount needs
	// user_allow_other in /etc/fuse.conf for it.
	AllowOther bool

	// Thread is used until the tree is unmounted, or Mount has failed; nil: one is made.
	Thread *Thread

	Log *slog.Logger
}

// Tree is a mounted tree.
type Tree struct {
	src      Source
	log      *slog.Logger
	dir      string // absolute, without symbolic links
	dev      string // of the mount: MAJOR:MINOR
	owner    fuse.Owner
	dirPerm  uint32
	server   *fuse.Server
	top      *dir
	contents budget
	open     openImages
	readers  readers
	gone     departures
	alone    atomic.Int32 // the thread that asks the tree itself

	done    chan struct{}  // closed when the kernel has unmounted the tree
	serving sync.WaitGroup // the goroutines that serve and notify
}

// Mount mounts a view of src. A mount that a killed process left behind in
// o.Dir is cleared first. It fails if o.Dir does not exist (unless o.Create), is
// not a directory, is not empty, or has a tree mounted that is alive; each error
// is one line that names o.Dir. Until Unmount has returned the tree calls src.
func Mount(ctx context.Context, src Source, o Options) (*Tree, error) {
	dir, err := prepare(ctx, o.Dir, o.Create)
	if err != nil {
		return nil, err
	}
	t := &Tree{
		src:     src,
		log:     o.Log,
		dir:     dir,
		owner:   fuse.Owner{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())},
		dirPerm: 0o700,
		done:    make(chan struct{}),
	}
	t.readers.panicked = t.panicked
	t.gone.wake = make(chan struct{}, 1)
	t.open.uses = map[*use]struct{}{}
	if o.AllowOther {
		t.dirPerm = 0o755
	}
	t.top = t.root()
	if err := t.mount(ctx, o.AllowOther, o.Thread); err != nil {
		return nil, fmt.Errorf("mount the tree on %s: %w", dir, err)
	}
	return t, nil
}

// mount mounts the tree and returns when it is served.
func (t *Tree) mount(ctx context.Context, allowOther bool, thread *Thread) error {
	fd, err := attach(ctx, t.dir, allowOther)
	if err != nil {
		return err
	}
	if err := t.start(fd); err != nil {
		unix.Close(fd)
		return also(err, unmount(ctx, t.dir, detach))
	}
	t.readers.buffers.open()
	t.serving.Go(func() {
		t.server.Serve()
		t.open.releaseAll()
		close(t.done)
		t.readers.stop()
	})
	first := make(chan error, 1)
	t.serving.Go(func() {
		if thread == nil {
			thread = NewThread()
			defer thread.End()
		}
		thread.do(func() { t.serveAlone(first) })
	})
	if err := <-first; err != nil {
		return also(err, t.Unmount(ctx))
	}
	return nil
}

// start makes the server for the connection fd that was mounted.
func (t *Tree) start(fd int) error {
	m, ok, err := mountAt(t.dir)
	if err != nil || !ok || m.fsType != fsType {
		return cmp.Or(err, errors.New("it is not in the mount table"))
	}
	t.dev = m.dev
	raw := fs.NewNodeFS(t.top, &fs.Options{
		FirstAutomaticIno: 2,
		RootStableAttr:    &fs.StableAttr{Ino: 1},
	})
	// By such a name the server takes a connection that is mounted already.
	t.server, err = fuse.NewServer(raw, fmt.Sprintf("/dev/fd/%d", fd), t.serverOptions())
	return err
}

// also adds to err, in one line, what went wrong afterwards.
func also(err, then error) error {
	if then == nil {
		return err
	}
	return fmt.Errorf("%w; then %w", err, then)
}

// serverOptions returns what measured best for reading images.
func (t *Tree) serverOptions() *fuse.MountOptions {
	return &fuse.MountOptions{
		MaxWrite:           maxIO,
		MaxBackground:      32, // requests, each with a buffer of up to maxIO
		DisableXAttrs:      true,
		DisableReadDirPlus: true, // it would make a node of all that is listed
		DisableSplice:      true, // what is read comes from buffers
		ExtraCapabilities:  fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
		Logger:             slog.NewLogLogger(t.log.Handler(), slog.LevelDebug),
		PanicHandler: func(v any) fuse.Status {
			t.panicked(v)
			return fuse.EIO
		},
	}
}

// panicked tells of a panic while a request was served. It is called by a deferred
// function.
func (t *Tree) panicked(v any) {
	t.log.Error("request panicked", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
}

// Dir returns where the tree is mounted: an absolute path without symbolic
// links.
func (t *Tree) Dir() string { return t.dir }

// Done returns a channel that is closed when the tree is no longer mounted,
// whoever unmounted it, or its connection was cut. Unmount is to be called all the
// same.
func (t *Tree) Done() <-chan struct{} { return t.done }
