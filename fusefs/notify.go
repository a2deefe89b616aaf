// Telling the kernel what is gone.

package fusefs

import (
	"context"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// departures are the names that the kernel has yet to be told about.
type departures struct {
	wake chan struct{} // holds one token if names may not be empty

	mu    sync.Mutex
	names []departure
}

// departure is a name that led to a directory that is gone.
type departure struct{ dir, name string }

// DeviceRemoved says that the device called name is gone, so that the kernel
// can forget it. It does not wait and may be called from anywhere, also from
// within the Source's methods.
func (t *Tree) DeviceRemoved(name string) { t.gone.add(departure{"devices", name}) }

// SnapshotDestroyed says the same of a snapshot.
func (t *Tree) SnapshotDestroyed(name string) { t.gone.add(departure{"snapshots", name}) }

func (g *departures) add(d departure) {
	g.mu.Lock()
	g.names = append(g.names, d)
	g.mu.Unlock()
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

func (g *departures) take() []departure {
	g.mu.Lock()
	defer g.mu.Unlock()
	names := g.names
	g.names = nil
	return names
}

// notify tells the kernel until the tree is unmounted.
func (t *Tree) notify() {
	for {
		select {
		case <-t.done:
			return
		case <-t.gone.wake:
		}
		for _, d := range t.gone.take() {
			t.forget(d)
		}
	}
}

// forget makes the kernel drop what it knows below a name, and tell those who
// watch it, by asking for the name: the answer is once that nothing leads to the node
// any more, and then that there is none. (The kernel can be told, too, but whoever
// tells it waits for all who are just looking up a name: see serveAlone.) A name that
// was taken again meanwhile leads to another node, and is safe.
func (t *Tree) forget(d departure) {
	parent := t.top.GetChild(d.dir)
	if parent == nil {
		return // never looked up
	}
	child := parent.GetChild(d.name)
	if child == nil || t.exists(d, child.Operations()) {
		return
	}
	shown, ok := child.Operations().(*dir)
	if !ok {
		return
	}
	shown.gone.Store(true)
	for range 2 {
		var st unix.Stat_t
		unix.Lstat(filepath.Join(t.dir, d.dir, d.name), &st) // what is answered is of no interest
	}
}

// lookUpGone answers for a name that leads nowhere: that, but for what forget asks
// first.
func (d *dir) lookUpGone(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	caller, ok := fuse.FromContext(ctx)
	if old := d.GetChild(name); ok && old != nil && int32(caller.Pid) == d.tree.alone.Load() {
		if o, ok := old.Operations().(*dir); ok && o.gone.CompareAndSwap(true, false) {
			o.known(out)
			out.Nlink = 0
			return old, 0
		}
	}
	return nil, syscall.ENOENT
}

// exists says whether the source still has what n shows.
func (t *Tree) exists(d departure, n fs.InodeEmbedder) bool {
	shown, ok := n.(*dir)
	if !ok {
		return false
	}
	if d.dir == "devices" {
		dev, ok := t.src.Device(d.name)
		return ok && shown.id == any(dev)
	}
	snap, ok := t.src.Snapshot(d.name)
	return ok && shown.id == any(snap)
}
