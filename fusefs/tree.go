// Mounting and serving the tree.

package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
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

	Log *slog.Logger
}

// Tree is a mounted tree.
type Tree struct {
	src     Source
	log     *slog.Logger
	dir     string // absolute, without symbolic links
	dev     string // of the mount: MAJOR:MINOR
	owner   fuse.Owner
	dirPerm uint32
	server  *fuse.Server
	top     *dir
	texts   budget
	gone    departures

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
	t.gone.wake = make(chan struct{}, 1)
	if o.AllowOther {
		t.dirPerm = 0o755
	}
	t.top = t.root()
	raw := fs.NewNodeFS(t.top, &fs.Options{
		FirstAutomaticIno: 2,
		RootStableAttr:    &fs.StableAttr{Ino: 1},
	})
	if t.server, err = fuse.NewServer(raw, dir, t.mountOptions(o.AllowOther)); err != nil {
		return nil, fmt.Errorf("mount the tree on %s: %w", dir, err)
	}
	return t, t.serve(ctx)
}

// mountOptions returns what measured best for images, see docs.
func (t *Tree) mountOptions(allowOther bool) *fuse.MountOptions {
	o := &fuse.MountOptions{
		FsName:             "blksnap",
		Name:               "blksnap",
		AllowOther:         allowOther,
		MaxWrite:           maxIO,
		MaxBackground:      64,
		DirectMountStrict:  os.Geteuid() == 0,
		DisableXAttrs:      true,
		DisableReadDirPlus: true, // it would stat, and so compute, what is listed
		DisableSplice:      true, // what is read comes from buffers
		ExtraCapabilities:  fuse.CAP_ASYNC_DIO | fuse.CAP_DIRECT_IO_ALLOW_MMAP,
		Logger:             slog.NewLogLogger(t.log.Handler(), slog.LevelDebug),
		PanicHandler: func(v any) fuse.Status {
			t.log.Error("request panicked", slog.Any("panic", v), slog.String("stack", string(debug.Stack())))
			return fuse.EIO
		},
	}
	if allowOther {
		o.Options = []string{"default_permissions"}
	}
	return o
}

// serve starts to serve what NewServer has mounted.
func (t *Tree) serve(ctx context.Context) error {
	t.serving.Go(func() {
		t.server.Serve()
		close(t.done)
	})
	t.serving.Go(t.notify)
	err := t.server.WaitMount()
	m, ok, merr := mountAt(t.dir)
	if err = errors.Join(err, merr); err == nil && !ok {
		err = errors.New("it is not in the mount table")
	}
	t.dev = m.dev
	if err != nil {
		err = fmt.Errorf("mount the tree on %s: %w", t.dir, err)
		return errors.Join(err, t.Unmount(ctx))
	}
	return nil
}

// Dir returns where the tree is mounted: an absolute path without symbolic
// links.
func (t *Tree) Dir() string { return t.dir }

// Done returns a channel that is closed when the tree is no longer mounted,
// whoever unmounted it.
func (t *Tree) Done() <-chan struct{} { return t.done }
