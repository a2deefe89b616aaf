// The changed-block map as a file.

package fusefs

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// mapFile shows the map's bytes. Each open file has the map as of its own open:
// Changes never change, so that needs no copy. The time of the last change is
// that of the last open: whoever compares times copies the map again.
type mapFile struct {
	node
	changes func() Changes
	size    int64 // of every map that is opened through this node

	// mu protects the field below.
	mu     sync.Mutex
	opened time.Time // last, or when the node was made
}

// mapItem returns an item for the map of changes.
func mapItem(tr traits, tracking func() Tracking, changes func() Changes) item {
	tr = tr.as(syscall.S_IFREG, 0)
	return item{"map", tr.kind, func() entry {
		return &mapFile{node: node{traits: tr}, changes: changes, size: tracking().MapSize(), opened: time.Now()}
	}}
}

// is returns false once the map grew with its device: a map that is open must
// not seem longer than it is.
func (f *mapFile) is(old fs.InodeEmbedder) bool {
	o, ok := old.(*mapFile)
	return ok && f.size == o.size
}

func (f *mapFile) known(out *fuse.EntryOut) { f.stat(&out.Attr) }

func (f *mapFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.stat(&out.Attr)
	return 0
}

func (f *mapFile) stat(a *fuse.Attr) {
	f.mu.Lock()
	opened := f.opened
	f.mu.Unlock()
	f.attr(a, textPerm, opened)
	a.Size = uint64(f.size)
}

func (f *mapFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if writes(flags) {
		return nil, 0, syscall.EROFS
	}
	changes := f.changes()
	if changes.MapSize() != f.size {
		return nil, 0, syscall.ESTALE // the kernel looks the name up again
	}
	f.mu.Lock()
	f.opened = time.Now()
	f.mu.Unlock()
	return &mapHandle{changes}, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

// mapHandle is an open mapFile.
type mapHandle struct{ changes Changes }

func (h *mapHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := max(0, min(int64(len(p)), h.changes.MapSize()-off))
	return fuse.ReadResultData(p[:h.changes.ReadMap(p[:n], off)]), 0
}
