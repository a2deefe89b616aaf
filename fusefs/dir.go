// Directories: how names become nodes.

package fusefs

import (
	"context"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// dir is a directory that asks for its entries each time.
type dir struct {
	node

	// id is the Device or Snapshot that the directory shows; nil where its
	// parent says that.
	id any

	// list returns the names, without . and .., and the kind of each.
	list func() []fuse.DirEntry

	// find returns a new node for name, or nil.
	find func(name string) entry

	gone atomic.Bool // what it shows is, and the kernel is to be told so
}

func (d *dir) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*dir)
	return ok && o.id == d.id
}

func (d *dir) known(out *fuse.EntryOut) {
	d.attr(&out.Attr, d.tree.dirPerm, d.born)
	out.SetAttrTimeout(always)
}

func (d *dir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.attr(&out.Attr, d.tree.dirPerm, d.born)
	out.SetTimeout(always)
	return 0
}

func (d *dir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	e := d.find(name)
	if e == nil {
		return d.lookUpGone(ctx, name, out)
	}
	return d.enter(ctx, name, e, out), 0
}

// enter returns the inode for e under name. It is the one that the name had
// before where that shows the same, so that a file keeps its inode number from
// stat to open: cp refuses to copy one that was replaced in between.
func (d *dir) enter(ctx context.Context, name string, e entry, out *fuse.EntryOut) *fs.Inode {
	if old := d.GetChild(name); old != nil && e.is(old.Operations()) {
		e = old.Operations().(entry)
	}
	e.known(out)
	out.SetEntryTimeout(e.base().keep)
	return d.NewInode(ctx, e, fs.StableAttr{Mode: e.base().kind})
}

func (d *dir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	all := []fuse.DirEntry{
		{Name: ".", Mode: syscall.S_IFDIR},
		{Name: "..", Mode: syscall.S_IFDIR},
	}
	return fs.NewListDirStream(append(all, d.list()...)), 0
}

// item is an entry of a directory whose names are always the same.
type item struct {
	name string
	kind uint32
	make func() entry
}

// fixed returns a directory with these items.
func fixed(tr traits, id any, items ...item) *dir {
	d := &dir{node: node{traits: tr}, id: id}
	d.list = func() []fuse.DirEntry {
		var names []fuse.DirEntry
		for _, it := range items {
			names = append(names, fuse.DirEntry{Name: it.name, Mode: it.kind})
		}
		return names
	}
	d.find = func(name string) entry {
		for _, it := range items {
			if it.name == name {
				return it.make()
			}
		}
		return nil
	}
	return d
}
