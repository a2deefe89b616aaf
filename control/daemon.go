// The daemon's core: the set of devices and snapshots. Everything that shows or
// changes it (the control socket, the tree, the NBD exports) comes here.

package control

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"blksnap/cow"
	"blksnap/fusefs"
	"blksnap/store"
)

// Daemon is the set of devices and snapshots. Its methods may be called from
// many goroutines at once.
type Daemon struct {
	version string
	log     *slog.Logger
	events  *events
	cat     *cow.Catalogue
	pool    *store.Pool
	uri     func(export string) string // NBD URI of an export

	// stateless is why there is no state directory, storeless why the snapstore lacks a
	// part; nil where it does not.
	stateless, storeless error

	// stopping is closed, under mu, when the daemon begins to stop: nothing is
	// added or taken from then on. idle is closed when the last client leaves a
	// daemon that has lost its tree.
	stopping, idle chan struct{}

	// complete is closed when the snapshots of a predecessor are known, or the start
	// has failed: before, nobody is shown a set that lacks some.
	complete chan struct{}

	// reads of exports can be held back.
	reads holder

	// rollbacks are those that run.
	rollbacks sync.WaitGroup

	// Locks, in the order in which they are taken.

	// changing serializes taking and destroying snapshots and removing devices,
	// so that what one has checked still holds when it acts. Held across I/O,
	// never while the tree is told of a change.
	changing sync.Mutex

	// writing serializes writing the set file. Held across I/O.
	writing sync.Mutex

	// mu protects the fields below. Never held across I/O.
	mu        sync.Mutex
	devices   map[string]*device
	adding    map[string]bool          // names of devices that are being opened
	removing  map[string]chan struct{} // closed when the device is removed
	snapshots []*cow.Snapshot          // oldest first
	number    uint64                   // highest snapshot number that a removed device had
	clients   int                      // NBD connections to exports of any kind
	treeless  bool                     // the tree was unmounted under clients: end with the last one
	tree      *fusefs.Tree             // nil where there is none
	onLow     func(store.LowSpace)

	// disconnect cuts off the clients of an export; nil while there is no server.
	disconnect func(ctx context.Context, export string) error

	run     string   // directory of the set file, empty where there is none
	mount   string   // where the tree is mounted, empty where it is not
	dirs    []string // where we keep state
	members members  // as it was at the start
}

// device is a device in the set.
type device struct {
	*cow.Device
	request DeviceRequest
	added   bool // at run time

	// Protected by Daemon.mu:

	clients int    // NBD connections to its live export
	rolling string // snapshot that it is being rolled back to, empty for none
}

func newDaemon(version string, log *slog.Logger, cat *cow.Catalogue, pool *store.Pool, uri func(string) string) *Daemon {
	d := &Daemon{
		version: version, log: log, events: newEvents(), cat: cat, pool: pool, uri: uri,
		stopping: make(chan struct{}),
		idle:     make(chan struct{}),
		complete: make(chan struct{}),
		devices:  make(map[string]*device),
		adding:   make(map[string]bool),
		removing: make(map[string]chan struct{}),
	}
	pool.OnLow(d.noteLow)
	return d
}

// record logs what happened and keeps it as an event.
func (d *Daemon) record(kind, device, snapshot, text string) {
	e := Event{Time: time.Now(), Kind: kind, Device: device, Snapshot: snapshot, Text: text}
	d.events.add(e)
	attrs := []any{}
	for _, a := range [][2]string{{"device", device}, {"snapshot", snapshot}, {"text", text}} {
		if a[1] != "" {
			attrs = append(attrs, a[0], a[1])
		}
	}
	d.log.Info(kind, attrs...)
}

// noteEngine keeps an event of the engine, which has logged it.
func (d *Daemon) noteEngine(e cow.Event) {
	d.events.add(Event{Time: e.Time, Kind: e.Kind, Device: e.Device, Snapshot: e.Snapshot, Text: e.Text})
}

// noteLow says that the snapstore is running low, before snapshots are lost.
func (d *Daemon) noteLow(l store.LowSpace) {
	d.record("store-low", "", "", SpaceInfo(l).text())
	d.mu.Lock()
	command := d.onLow
	d.mu.Unlock()
	if command != nil {
		command(l)
	}
}

// setTree says which tree shows the daemon.
func (d *Daemon) setTree(t *fusefs.Tree) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tree = t
}

// noteTree tells the tree, if there is one, that something is gone. What is new
// it finds by itself.
func (d *Daemon) noteTree(tell func(*fusefs.Tree)) {
	d.mu.Lock()
	tree := d.tree
	d.mu.Unlock()
	if tree != nil {
		tell(tree)
	}
}

// isStopping says whether the daemon has begun to stop.
func (d *Daemon) isStopping() bool {
	select {
	case <-d.stopping:
		return true
	default:
		return false
	}
}

// stop lets nothing be added or taken from now on, and waits until what was
// being taken or destroyed is.
func (d *Daemon) stop() {
	d.mu.Lock()
	close(d.stopping)
	d.mu.Unlock()
	d.changing.Lock()
	defer d.changing.Unlock()
}

// loseTree notes that the tree was unmounted under us. Without clients the
// daemon is idle then, else when the last one leaves: a disk must not vanish
// under a machine.
func (d *Daemon) loseTree() {
	d.mu.Lock()
	d.tree = nil
	clients := d.clients
	d.treeless = clients > 0
	d.mu.Unlock()
	if clients > 0 {
		d.record("tree-unmounted", "", "", plural(clients, "NBD connection")+" open: stopping when the last one ends")
		return
	}
	d.record("tree-unmounted", "", "", "stopping")
	close(d.idle)
}

// countClientLocked counts an NBD connection to an export, of dev if it is a live
// one. The caller holds mu.
func (d *Daemon) countClientLocked(dev *device) {
	d.clients++
	if dev != nil {
		dev.clients++
	}
}

// dropClient takes countClientLocked back.
func (d *Daemon) dropClient(dev *device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients--
	if dev != nil {
		dev.clients--
	}
	if d.clients == 0 && d.treeless {
		d.treeless = false // clients may still come and go while we stop
		close(d.idle)
	}
}

// snapshotLocked returns the snapshot called name. The caller holds mu.
func (d *Daemon) snapshotLocked(name string) (*cow.Snapshot, bool) {
	i := slices.IndexFunc(d.snapshots, func(s *cow.Snapshot) bool { return s.Name() == name })
	if i < 0 {
		return nil, false
	}
	return d.snapshots[i], true
}
