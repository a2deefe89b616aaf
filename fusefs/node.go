// What every file and directory of the tree has in common.

package fusefs

import (
	"context"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// always is how long the kernel may keep what cannot change.
const always = time.Hour

// entry is a node as its directory sees it.
type entry interface {
	fs.InodeEmbedder

	// base returns what it has in common with all nodes.
	base() *node

	// is says whether old, which the directory had under this name before, can
	// go on in place of this new node.
	is(old fs.InodeEmbedder) bool

	// known fills in the attributes that cost nothing to tell and, if these are
	// all, how long the kernel may keep them; otherwise it asks by Getattr.
	known(out *fuse.EntryOut)
}

// node is embedded by all nodes. Its methods refuse what the tree does not
// offer; where go-fuse's own answer would be success or an odd error.
type node struct {
	fs.Inode
	traits
}

// traits are what a node is made with; they do not change.
type traits struct {
	tree *Tree
	kind uint32        // syscall.S_IFDIR, S_IFREG or S_IFLNK
	live bool          // see the package's words
	keep time.Duration // of the name
	born time.Time     // of what it shows; a frozen file's time of last change
}

// as returns the traits of a node of another kind, with another keep.
func (tr traits) as(kind uint32, keep time.Duration) traits {
	tr.kind, tr.keep = kind, keep
	return tr
}

func (n *node) base() *node { return n }

// attr fills in what all nodes show; perm are the permission bits.
func (n *node) attr(a *fuse.Attr, perm uint32, changed time.Time) {
	a.Mode = n.kind | perm
	a.Nlink = 1 // for a directory: the number of its subdirectories is not told
	a.Owner = n.tree.owner
	a.SetTimes(&changed, &changed, &changed)
}

// Statfs shows the snapstore's size and free space (df).
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	const block = 4096
	size, free := n.tree.src.Space()
	out.Bsize, out.Frsize = block, block
	out.Blocks = uint64(size) / block
	out.Bfree = uint64(free) / block
	out.Bavail = out.Bfree
	out.NameLen = 255
	return 0
}

// Access is not asked again by the kernel after this answer: who may use the
// tree is decided by the mount, and with allow-other by the modes, which the
// kernel checks itself.
func (n *node) Access(context.Context, uint32) syscall.Errno { return syscall.ENOSYS }

func (n *node) Setattr(context.Context, fs.FileHandle, *fuse.SetAttrIn, *fuse.AttrOut) syscall.Errno {
	return syscall.EPERM
}

func (n *node) Create(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EPERM
}

func (n *node) Mkdir(context.Context, string, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Symlink(context.Context, string, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Rename(context.Context, string, fs.InodeEmbedder, string, uint32) syscall.Errno {
	return syscall.EPERM
}

func (n *node) Unlink(context.Context, string) syscall.Errno { return syscall.EPERM }

func (n *node) Rmdir(context.Context, string) syscall.Errno { return syscall.EPERM }
