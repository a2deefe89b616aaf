// Telling the kernel what is gone.

package fusefs

import (
	"log/slog"
	"sync"

	"github.com/hanwen/go-fuse/v2/fs"
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
// watch it. The kernel checks that the name still leads to the node
// named, so one that was taken again meanwhile is safe.
func (t *Tree) forget(d departure) {
	parent := t.top.GetChild(d.dir)
	if parent == nil {
		return // never looked up
	}
	child := parent.GetChild(d.name)
	if child == nil || t.exists(d, child.Operations()) {
		return
	}
	if errno := parent.NotifyDelete(d.name, child); errno != 0 {
		// ENOENT: the kernel had forgotten it, or rmdir has told it.
		// ENOTEMPTY: files are open below; the name is gone all the same.
		t.log.Debug("tell the kernel", slog.String("gone", d.dir+"/"+d.name), slog.Any("err", errno))
	}
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
