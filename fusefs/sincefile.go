// The files since/NUM and since/all: lists of runs as text.
//
// A stat says how long such a file is, and must agree with what is read after
// an open. The kernel does not say which open file a stat is about, so a node
// has at most one text at a time:
//
//	closed    no text; a stat makes it, to know its edition, and keeps none
//	open      the text made at the first open, shared by all who open the
//	          file until the last of them closes it
//
// So that nobody gets a text from before his own open, a lookup asks whether
// the text of an open node is still right, and makes a new node where it is
// not. A lookup of a closed node computes nothing.
//
// The time of the last change is when the node was first seen to have its
// edition: tar takes another time for a change under its hands.

package fusefs

import (
	"context"
	"iter"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// sinceFile is the list of what changed, or of all that is allocated.
type sinceFile struct {
	node
	runs func() (iter.Seq2[Run, error], error) // as of the call

	// mu protects the fields below. Not held while runs are read.
	mu     sync.Mutex
	shared *sharedText // nil while the file is closed
	opens  int
	seen   edition // last
	since  time.Time
}

// sharedText is the text of an open sinceFile; it is made once.
type sharedText struct {
	once    sync.Once
	text    *text
	edition edition
	err     error
}

func (f *sinceFile) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*sinceFile)
	if !ok {
		return false
	}
	o.mu.Lock()
	shared := o.shared
	o.mu.Unlock()
	if shared == nil {
		return true
	}
	if o.fill(shared) != nil {
		return false
	}
	now, err := f.measure()
	return err == nil && now == shared.edition
}

// measure returns the edition of the file as of now.
func (f *sinceFile) measure() (edition, error) {
	runs, err := f.runs()
	if err != nil {
		return edition{}, err
	}
	return measure(runs)
}

// fill makes the text of s, or waits until it is made.
func (f *sinceFile) fill(s *sharedText) error {
	s.once.Do(func() {
		s.err = syscall.EIO // if runs panics
		runs, err := f.runs()
		if err == nil {
			s.text, s.edition, err = f.tree.texts.fill(runs)
		}
		s.err = err
	})
	return s.err
}

// current returns the edition that a stat is about, and since when the file has
// it: the open one if there is one.
func (f *sinceFile) current() (edition, time.Time, error) {
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	var e edition
	var err error
	if shared != nil {
		err = f.fill(shared)
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
func (f *sinceFile) note(e edition) time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since.IsZero() || f.seen != e {
		f.seen, f.since = e, time.Now()
	}
	return f.since
}

// known tells no size but that of an open text, which is has compared already.
func (f *sinceFile) known(out *fuse.EntryOut) {
	f.attr(&out.Attr, textPerm, f.born)
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	if shared != nil && f.fill(shared) == nil {
		out.Size = uint64(shared.edition.size)
	}
}

func (f *sinceFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	e, since, err := f.current()
	if err != nil {
		return f.tree.errno("stat", f.Path(nil), err)
	}
	f.attr(&out.Attr, textPerm, since)
	out.Size = uint64(e.size)
	return 0
}

func (f *sinceFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	f.mu.Lock()
	if f.shared == nil {
		f.shared = new(sharedText)
	}
	h := &sinceHandle{f, f.shared}
	f.opens++
	f.mu.Unlock()
	if err := f.fill(h.shared); err != nil {
		h.close()
		return nil, 0, f.tree.errno("open", f.Path(nil), err)
	}
	return h, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

// sinceHandle is an open sinceFile.
type sinceHandle struct {
	file   *sinceFile
	shared *sharedText
}

func (h *sinceHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(p[:h.shared.text.readAt(p, off)]), 0
}

func (h *sinceHandle) Release(context.Context) syscall.Errno {
	h.close()
	return 0
}

func (h *sinceHandle) close() {
	h.file.mu.Lock()
	h.file.opens--
	last := h.file.opens == 0
	if last {
		h.file.shared = nil
	}
	h.file.mu.Unlock()
	if last && h.shared.text != nil {
		h.shared.text.free()
	}
}
