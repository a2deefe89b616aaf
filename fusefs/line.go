// Files of one line.

package fusefs

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// textPerm are the permissions of all files but images.
const textPerm = 0o444

// lineFile is a file of one line and a newline.
type lineFile struct {
	node
	now func() string // the line as of the call, without newline

	// mu protects the fields below. Not held while now is called: it may wait
	// for the Source, and Release must not.
	mu    sync.Mutex
	text  string // what was last shown; does not change while the file is open
	since time.Time
	opens int
}

// line returns an item for a file of one line.
func line(tr traits, name string, now func() string) item {
	tr.kind = syscall.S_IFREG
	return item{name, tr.kind, func() entry {
		return &lineFile{node: node{traits: tr}, now: now, since: tr.born}
	}}
}

// read returns now's answer as the file shows it.
func (f *lineFile) read() string {
	return strings.ReplaceAll(f.now(), "\n", " ") + "\n"
}

// refresh returns what the file shows and since when. That is the present line
// unless the file is open; opens is added to the number of those who have it
// open.
func (f *lineFile) refresh(opens int) (string, time.Time) {
	now := f.read()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.opens == 0 && f.text != now {
		if f.live {
			f.since = time.Now()
		}
		f.text = now
	}
	f.opens += opens
	return f.text, f.since
}

func (f *lineFile) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*lineFile)
	if !ok {
		return false
	}
	now := f.read()
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.opens == 0 || o.text == now
}

func (f *lineFile) known(out *fuse.EntryOut) { out.SetAttrTimeout(f.stat(&out.Attr)) }

func (f *lineFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.SetTimeout(f.stat(&out.Attr))
	return 0
}

// stat fills in a and returns how long it may be kept.
func (f *lineFile) stat(a *fuse.Attr) time.Duration {
	text, since := f.refresh(0)
	f.attr(a, textPerm, since)
	a.Size = uint64(len(text))
	return f.keep
}

func (f *lineFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	text, _ := f.refresh(1)
	return &lineHandle{f, text}, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

// writes says whether a file opened with these flags can be written.
func writes(flags uint32) bool { return flags&syscall.O_ACCMODE != syscall.O_RDONLY }

// lineHandle is an open lineFile.
type lineHandle struct {
	file *lineFile
	text string
}

func (h *lineHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := copy(p, h.text[min(off, int64(len(h.text))):])
	return fuse.ReadResultData(p[:n]), 0
}

func (h *lineHandle) Release(context.Context) syscall.Errno {
	h.file.mu.Lock()
	defer h.file.mu.Unlock()
	h.file.opens--
	return 0
}
