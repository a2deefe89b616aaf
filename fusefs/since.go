// The files since/NUM and since/all.
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
	"strconv"
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
	size   int64 // of a frozen text that was counted; -1 before
}

// sharedText is the text of an open sinceFile; it is made once.
type sharedText struct {
	once sync.Once
	made time.Time
	text *text
	err  error
}

// since returns an item for the directory of all NUMs of changes. It lists the
// numbers of existing snapshots; all that changes knows can be looked up.
func since(tr traits, changes func() Changes) item {
	file := tr.as(syscall.S_IFREG, tr.keep)
	d := &dir{node: node{traits: tr.as(syscall.S_IFDIR, always)}}
	d.list = func() []fuse.DirEntry {
		names := []fuse.DirEntry{{Name: "all", Mode: file.kind}}
		for _, num := range changes().Numbers() {
			names = append(names, fuse.DirEntry{Name: strconv.FormatUint(num, 10), Mode: file.kind})
		}
		return names
	}
	d.find = func(name string) entry {
		runs, ok := runsOf(name, changes)
		if !ok {
			return nil
		}
		return &sinceFile{node: node{traits: file}, runs: runs, size: -1}
	}
	return item{"since", syscall.S_IFDIR, func() entry { return d }}
}

// runsOf returns what reads the runs of the file called name, and whether there
// is such a file.
func runsOf(name string, changes func() Changes) (func() (iter.Seq2[Run, error], error), bool) {
	if name == "all" {
		return func() (iter.Seq2[Run, error], error) { return changes().All(), nil }, true
	}
	num, ok := parseNum(name)
	if c := changes(); !ok || num < c.Base() || num > c.Number() {
		return nil, false
	}
	return func() (iter.Seq2[Run, error], error) {
		runs, ok := changes().Since(num)
		if !ok {
			return nil, syscall.ENOENT // the base moved up in the meantime
		}
		return runs, nil
	}, true
}

// parseNum returns the number that name is the decimal form of: no sign, no
// leading zero.
func parseNum(name string) (uint64, bool) {
	num, err := strconv.ParseUint(name, 10, 64)
	return num, err == nil && strconv.FormatUint(num, 10) == name
}

func (f *sinceFile) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*sinceFile)
	if !ok {
		return false
	}
	o.mu.Lock()
	shared := o.shared
	o.mu.Unlock()
	if shared == nil || !o.live {
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
		s.made = time.Now()
		var runs iter.Seq2[Run, error]
		if runs, s.err = f.runs(); s.err == nil {
			s.text, s.err = f.tree.texts.fill(runs)
		}
	})
	return s.err
}

// known tells the size where it was counted before; a live one that is open
// has passed is.
func (f *sinceFile) known(out *fuse.EntryOut) {
	f.mu.Lock()
	shared, size := f.shared, f.size
	f.mu.Unlock()
	f.attr(&out.Attr, textPerm, f.born)
	switch {
	case size >= 0:
		out.Size = uint64(size)
		out.SetAttrTimeout(f.keep)
	case shared != nil && f.fill(shared) == nil:
		out.Size = uint64(shared.text.size)
	}
}

func (f *sinceFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	size, changed, err := f.stat()
	if err != nil {
		return f.tree.errno("stat", f.Path(nil), err)
	}
	f.attr(&out.Attr, textPerm, changed)
	out.Size = uint64(size)
	out.SetTimeout(f.keep)
	return 0
}

// stat returns the size and the time of the text: the open one if there is one.
func (f *sinceFile) stat() (int64, time.Time, error) {
	f.mu.Lock()
	shared, size := f.shared, f.size
	f.mu.Unlock()
	switch {
	case size >= 0:
		return size, f.born, nil
	case shared != nil:
		if err := f.fill(shared); err != nil {
			return 0, time.Time{}, err
		}
		size = shared.text.size
	default:
		runs, err := f.runs()
		if err != nil {
			return 0, time.Time{}, err
		}
		shared = &sharedText{made: time.Now()}
		if size, err = measure(runs); err != nil {
			return 0, time.Time{}, err
		}
	}
	if f.live {
		return size, shared.made, nil
	}
	f.mu.Lock()
	f.size = size
	f.mu.Unlock()
	return size, f.born, nil
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
