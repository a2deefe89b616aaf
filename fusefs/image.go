// Image files.

package fusefs

import (
	"context"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// maxIO is the largest read or write that the kernel sends, in bytes. It
	// is also the images' preferred block size: cp reads in such pieces.
	maxIO = 1 << 20

	// imagePerm are the permissions of an image: a copy made by cp is then
	// private and writable.
	imagePerm = 0o600
)

// imageFile shows an image.
type imageFile struct {
	node
	image   Image
	written atomic.Int64 // last through this tree, in ns since 1970; 0: never
}

// imageItem returns an item for image.
func imageItem(tr traits, name string, image Image) item {
	tr.kind = syscall.S_IFREG
	return item{name, tr.kind, func() entry {
		return &imageFile{node: node{traits: tr}, image: image}
	}}
}

func (f *imageFile) is(old fs.InodeEmbedder) bool {
	_, ok := old.(*imageFile)
	return ok
}

// stat fills in a. allocated is in bytes.
func (f *imageFile) stat(a *fuse.Attr, allocated int64) {
	changed := f.born
	if ns := f.written.Load(); ns != 0 {
		changed = time.Unix(0, ns)
	}
	f.attr(a, imagePerm, changed)
	a.Size = uint64(f.image.Size())
	a.Blksize = maxIO
	a.Blocks = uint64(allocated+511) / 512
}

// known does not ask what is allocated: the first who asks may have to wait for
// the origin's holes to be looked up.
func (f *imageFile) known(out *fuse.EntryOut) { f.stat(&out.Attr, f.image.Size()) }

func (f *imageFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	allocated, err := f.image.Allocated()
	if err != nil {
		// The file still has a size, a mode and a time. Without holes nobody
		// who copies it skips a part and takes it for zeroes.
		f.tree.errno("stat", f.Path(nil), err)
		f.stat(&out.Attr, f.image.Size())
		return 0
	}
	f.stat(&out.Attr, allocated)
	if !f.image.Writable() {
		out.SetTimeout(always)
	}
	return 0
}

// Setattr refuses to change anything. A truncation to the size that the image
// has is allowed, because programs that write a disk image begin with that.
func (f *imageFile) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	size, ok := in.GetSize()
	switch {
	case !ok || in.Valid&^(fuse.FATTR_SIZE|fuse.FATTR_FH|fuse.FATTR_LOCKOWNER) != 0:
		return syscall.EPERM
	case !f.image.Writable():
		return syscall.EROFS
	case int64(size) != f.image.Size():
		return syscall.EPERM
	}
	return f.Getattr(ctx, h, out)
}

func (f *imageFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) && !f.image.Writable() {
		return nil, 0, syscall.EROFS
	}
	use, err := f.tree.open.acquire(f.image)
	if err != nil {
		return nil, 0, f.tree.errno("open", f.Path(nil), err)
	}
	h := &imageHandle{f, use, f.tree.readers.newStream(f.image)}
	if writes(flags) {
		return h, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES, 0
	}
	return h, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

// imageHandle is an open image.
type imageHandle struct {
	file   *imageFile
	use    *use
	stream *stream
}

// Read is the one way in which the content of images reaches the kernel. p is
// one of go-fuse's pooled buffers, up to maxIO long.
func (h *imageHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	p = p[:max(0, min(int64(len(p)), h.file.image.Size()-off))]
	result, err := h.stream.read(p, off)
	if err != nil {
		// Whatever went wrong, to the reader the bytes are lost.
		h.fail("read", err)
		return nil, syscall.EIO
	}
	return result, 0
}

// Write writes what fits: like a block device's, an image's size is fixed.
func (h *imageHandle) Write(_ context.Context, p []byte, off int64) (uint32, syscall.Errno) {
	image := h.file.image
	if len(p) > 0 && off >= image.Size() {
		return 0, syscall.ENOSPC
	}
	h.file.written.Store(time.Now().UnixNano())
	n, err := image.WriteAt(p[:min(int64(len(p)), image.Size()-off)], off)
	if n > 0 {
		return uint32(n), 0
	}
	return 0, h.fail("write", err)
}

func (h *imageHandle) Fsync(context.Context, uint32) syscall.Errno {
	if !h.file.image.Writable() {
		return 0
	}
	return h.fail("fsync", h.file.image.Sync())
}

// Allocate zeroes a range. Space cannot be reserved: that would hold up what
// the snapstore is for.
func (h *imageHandle) Allocate(_ context.Context, off, n uint64, mode uint32) syscall.Errno {
	image := h.file.image
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE:
	default:
		return syscall.EOPNOTSUPP
	}
	size := uint64(image.Size())
	fits := off <= size && n <= size-off
	switch {
	case !fits && mode&unix.FALLOC_FL_KEEP_SIZE == 0:
		return syscall.ENOSPC
	case off >= size:
		return 0
	}
	h.file.written.Store(time.Now().UnixNano())
	return h.fail("zero", image.Zero(int64(off), int64(min(n, size-off))))
}

// Lseek finds data and holes (SEEK_DATA and SEEK_HOLE); the kernel does the
// rest.
func (h *imageHandle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	image := h.file.image
	if off >= uint64(image.Size()) {
		return 0, syscall.ENXIO
	}
	next := image.NextHole
	switch whence {
	case unix.SEEK_HOLE:
	case unix.SEEK_DATA:
		next = image.NextData
	default:
		return 0, syscall.EINVAL
	}
	found, err := next(int64(off))
	if err != nil {
		return 0, h.fail("seek", err)
	}
	return uint64(found), 0
}

func (h *imageHandle) Release(context.Context) syscall.Errno {
	h.stream.close()
	h.use.release()
	return 0
}

func (h *imageHandle) fail(op string, err error) syscall.Errno {
	if err == nil {
		return 0
	}
	return h.file.tree.errno(op, h.file.Path(nil), err)
}
