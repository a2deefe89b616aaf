// The files since/NUM and since/all: lists of runs as text.
//
// A stat says how long such a file is, and must agree with what is read after
// an open. The kernel does not say which open file a stat is about, so a node
// has at most one text at a time:
//
//	closed    no text; a stat counts the bytes and forgets them
//	open      the text made at the first open, shared by all who open the
//	          file until the last of them closes it
//
// So that nobody gets a text from before his own open, a lookup asks whether
// the text of an open node is still right, and makes a new node where it is
// not. A lookup of a closed node computes nothing.

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
}

// sharedText is the text of an open sinceFile; it is made once.
type sharedText struct {
	once sync.Once
	made time.Time
	text *text
	err  error
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
	runs, err := f.runs()
	return err == nil && shared.text.equals(runs)
}

// fill makes the text of s, or waits until it is made.
func (f *sinceFile) fill(s *sharedText) error {
	s.once.Do(func() {
		s.made, s.err = time.Now(), syscall.EIO // if runs panics
		runs, err := f.runs()
		if err == nil {
			s.text, err = f.tree.texts.fill(runs)
		}
		s.err = err
	})
	return s.err
}

// known tells no size but that of an open text, which is has compared already.
func (f *sinceFile) known(out *fuse.EntryOut) {
	f.attr(&out.Attr, textPerm, f.born)
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	if shared != nil && f.fill(shared) == nil {
		out.Size = uint64(shared.text.size)
	}
}

func (f *sinceFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	size, made, err := f.stat()
	if err != nil {
		return f.tree.errno("stat", f.Path(nil), err)
	}
	f.attr(&out.Attr, textPerm, made)
	out.Size = uint64(size)
	return 0
}

// stat returns the size and the age of the text: the open one if there is one.
func (f *sinceFile) stat() (size int64, made time.Time, err error) {
	f.mu.Lock()
	shared := f.shared
	f.mu.Unlock()
	if shared != nil {
		if err := f.fill(shared); err != nil {
			return 0, time.Time{}, err
		}
		return shared.text.size, shared.made, nil
	}
	made = time.Now()
	runs, err := f.runs()
	if err == nil {
		size, err = measure(runs)
	}
	return size, made, err
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
