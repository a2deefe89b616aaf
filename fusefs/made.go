// Files whose content is made when they are opened: lists of changes, and qcow2
// files.
//
// A stat says how long such a file is, and must agree with what is read after
// an open. The kernel does not say which open file a stat is about, so a node
// has at most one content at a time:
//
//	closed    no content; a stat measures it, to know its edition, and keeps
//	          nothing else
//	open      the content made at the first open, shared by all who open the
//	          file until the last of them closes it
//
// So that nobody gets a content from before his own open, a lookup asks whether
// that of an open node is still right, and makes a new node where it is not. A
// lookup of a closed node computes nothing.
//
// The time of the last change is when the node was first seen to have its
// edition: tar takes another time for a change under its hands.

package fusefs

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// edition tells one content of a file from another without holding it.
type edition struct {
	size int64 // bytes
	sum  uint64
}

// maker makes the content of a file, as of the call.
type maker interface {
	// measure returns the edition of what fill would make.
	measure() (edition, error)
	fill() (content, edition, error)
}

// content is what an open file shows.
type content interface {
	// readAt fills p from off on and returns how many bytes there were.
	readAt(p []byte, off int64) (int, error)

	// free gives back what the content holds. Nobody reads it any more.
	free()
}

// madeFile is a file that is made when it is opened.
type madeFile struct {
	node
	maker
	perm uint32

	// mu protects the fields below. Not held while a maker works.
	mu     sync.Mutex
	shared *sharedContent // nil while the file is closed
	opens  int
	seen   edition // last
	since  time.Time
}

// sharedContent is the content of an open madeFile; it is made once.
type sharedContent struct {
	once    sync.Once
	content content // nil after an error
	edition edition
	err     error
}

func (f *madeFile) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*madeFile)
	if !ok {
		return false
	}
	o.mu.Lock()
	shared := o.shared
	o.mu.Unlock()
	if shared == nil {
		return true
	}
	if o.fillOnce(shared) != nil {
		return false
	}
	now, err := f.measure()
	return err == nil && now == shared.edition
}

// fillOnce makes the content of s, or waits until it is made.
func (f *madeFile) fillOnce(s *sharedContent) error {
	s.once.Do(func() {
		s.err = syscall.EIO // if the maker panics
		s.content, s.edition, s.err = f.fill()
	})
	return s.err
}

// current returns the edition that a stat is about, and since when the file has
// it: the open one if there is one.
func (f *madeFile) current() (edition, time.Time, error) {
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	var e edition
	var err error
	if shared != nil {
		err = f.fillOnce(shared)
		e = shared.edition
	} else {
		e, err = f.measure()
	}
	if err != nil {
		return edition{}, time.Time{}, err
	}
	return e, f.note(e), nil
}

// note remembers e and returns since when the file has it.
func (f *madeFile) note(e edition) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since.IsZero() || f.seen != e {
		f.seen, f.since = e, time.Now()
	}
	return f.since
}

// stat fills in a.
func (f *madeFile) stat(a *fuse.Attr, size int64, changed time.Time) {
	f.attr(a, f.perm, changed)
	a.Size = uint64(size)
	a.Blksize = maxIO
	a.Blocks = uint64(size+511) / 512
}

// known tells no size but that of an open content, which is has compared already.
func (f *madeFile) known(out *fuse.EntryOut) {
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	var size int64
	if shared != nil && f.fillOnce(shared) == nil {
		size = shared.edition.size
	}
	f.stat(&out.Attr, size, f.born)
}

func (f *madeFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	e, since, err := f.current()
	if err != nil {
		return f.tree.errno("stat", f.Path(nil), err)
	}
	f.stat(&out.Attr, e.size, since)
	return 0
}

func (f *madeFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	f.mu.Lock()
	if f.shared == nil {
		f.shared = new(sharedContent)
	}
	h := &madeHandle{f, f.shared}
	f.opens++
	f.mu.Unlock()
	if err := f.fillOnce(h.shared); err != nil {
		h.close()
		return nil, 0, f.tree.errno("open", f.Path(nil), err)
	}
	return h, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

// madeHandle is an open madeFile.
type madeHandle struct {
	file   *madeFile
	shared *sharedContent
}

func (h *madeHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := h.shared.content.readAt(p, off)
	if err != nil {
		// Whatever went wrong, to the reader the bytes are lost.
		h.file.tree.errno("read", h.file.Path(nil), err)
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (h *madeHandle) Release(context.Context) syscall.Errno {
	h.close()
	return 0
}

func (h *madeHandle) close() {
	h.file.mu.Lock()
	h.file.opens--
	last := h.file.opens == 0
	if last {
		h.file.shared = nil
	}
	h.file.mu.Unlock()
	if last && h.shared.content != nil {
		h.shared.content.free()
	}
}
