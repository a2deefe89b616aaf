// The directory of snapshots: mkdir takes one, rmdir destroys it.

package fusefs

import (
	"context"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// latest is the name of the link to the newest snapshot.
const latest = "latest"

// snapshotsDir is the directory of all snapshots.
type snapshotsDir struct{ dir }

func (t *Tree) snapshots(tr traits) *snapshotsDir {
	link := tr.as(syscall.S_IFLNK, 0)
	d := &snapshotsDir{dir{node: node{traits: tr}}}
	d.list = func() []fuse.DirEntry {
		var names []fuse.DirEntry
		if t.src.Latest() != "" {
			names = append(names, fuse.DirEntry{Name: latest, Mode: link.kind})
		}
		return append(names, named(syscall.S_IFDIR, t.src.Snapshots())...)
	}
	d.find = func(name string) entry {
		if name == latest {
			if t.src.Latest() == "" {
				return nil
			}
			return &latestLink{node{traits: link}}
		}
		snap, ok := t.src.Snapshot(name)
		if !ok {
			return nil
		}
		return t.snapshot(snap)
	}
	return d
}

func (d *snapshotsDir) is(old fs.InodeEmbedder) bool {
	_, ok := old.(*snapshotsDir)
	return ok
}

// Mkdir takes a snapshot. Its directory can be used when mkdir returns. The
// kernel lets nobody list the directory or look up a new name in it meanwhile;
// names that it knows can be used.
func (d *snapshotsDir) Mkdir(ctx context.Context, name string, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name == latest {
		return nil, syscall.EINVAL
	}
	if err := d.tree.src.Take(name); err != nil {
		return nil, d.tree.errno("mkdir", name, err)
	}
	e := d.find(name)
	if e == nil {
		return nil, syscall.ENOENT // destroyed already
	}
	return d.enter(ctx, name, e, out), 0
}

// Rmdir destroys a snapshot. The kernel has refused the link and unknown names.
func (d *snapshotsDir) Rmdir(_ context.Context, name string) syscall.Errno {
	return d.tree.errno("rmdir", name, d.tree.src.Destroy(name))
}

// latestLink is the symbolic link to the newest snapshot.
type latestLink struct{ node }

func (l *latestLink) is(old fs.InodeEmbedder) bool {
	_, ok := old.(*latestLink)
	return ok
}

func (l *latestLink) known(out *fuse.EntryOut) { l.stat(&out.Attr) }

func (l *latestLink) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	l.stat(&out.Attr)
	return 0
}

func (l *latestLink) stat(a *fuse.Attr) {
	name := l.tree.src.Latest()
	changed := l.born
	if snap, ok := l.tree.src.Snapshot(name); ok {
		changed = snap.Created()
	}
	l.attr(a, 0o777, changed)
	a.Size = uint64(len(name))
}

func (l *latestLink) Readlink(context.Context) ([]byte, syscall.Errno) {
	name := l.tree.src.Latest()
	if name == "" {
		return nil, syscall.ENOENT
	}
	return []byte(name), 0
}
