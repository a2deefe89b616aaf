// What the tree shows: the daemon as a fusefs.Source. The types here are views
// of the engine's, and equal exactly where they show the same object: so the
// tree tells a snapshot from a later one of the same name.

package control

import (
	"iter"
	"slices"
	"syscall"
	"time"

	"blksnap/cow"
	"blksnap/fusefs"
)

// treeSource is the daemon as the tree sees it.
type treeSource struct{ d *Daemon }

// set is the daemon, once its set of devices and snapshots is complete.
func (s treeSource) set() *Daemon {
	<-s.d.complete
	return s.d
}

func (s treeSource) Version() string { return "blksnap " + s.d.version }

func (s treeSource) Devices() []string {
	var names []string
	for _, dev := range s.set().sortedDevices() {
		names = append(names, dev.Name())
	}
	return names
}

func (s treeSource) Device(name string) (fusefs.Device, bool) {
	dev, err := s.set().device(name)
	return treeDevice{s.d, dev}, err == nil
}

func (s treeSource) Snapshots() []string {
	var names []string
	for _, snap := range s.set().allSnapshots() {
		names = append(names, snap.Name())
	}
	slices.Sort(names)
	return names
}

func (s treeSource) Snapshot(name string) (fusefs.Snapshot, bool) {
	snap, err := s.set().snapshot(name)
	return treeSnapshot{s.d, snap}, err == nil
}

func (s treeSource) Latest() string {
	all := s.set().allSnapshots()
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1].Name()
}

func (s treeSource) Take(name string) error {
	if name == "" {
		return syscall.EINVAL
	}
	_, err := s.set().take(SnapshotRequest{Name: name})
	return err
}

func (s treeSource) Destroy(name string) error { return s.set().destroy(name, false) }

func (s treeSource) Space() (size, free int64) {
	size, _, free = s.d.pool.Space()
	return size, free
}

type treeDevice struct {
	d *Daemon
	*device
}

func (v treeDevice) URI() string { return v.d.uri(v.Name()) }

func (v treeDevice) State() string { return v.d.stateOf(v.device) }

func (v treeDevice) Tracking() fusefs.Tracking {
	return treeTracking{v.device.Tracking(), v.d, v.Name()}
}

func (v treeDevice) Changes() fusefs.Changes {
	return treeChanges{v.device.Changes(), v.d, v.Name()}
}

type treeSnapshot struct {
	d *Daemon
	*cow.Snapshot
}

func (v treeSnapshot) Created() time.Time { return v.Snapshot.Created() }

func (v treeSnapshot) Images() []string {
	var names []string
	for _, i := range v.Snapshot.Images() {
		names = append(names, i.Device().Name())
	}
	return names
}

func (v treeSnapshot) Image(device string) (fusefs.Image, bool) {
	i, ok := v.Snapshot.Image(device)
	return treeImage{v.d, i}, ok
}

type treeImage struct {
	d *Daemon
	*cow.Image
}

func (v treeImage) Changes() fusefs.Changes {
	return treeChanges{v.Image.Changes(), v.d, v.Device().Name()}
}

// treeTracking adds to where a device's change tracking stands which of its snapshots
// exist.
type treeTracking struct {
	cow.Tracking
	d      *Daemon
	device string
}

func (t treeTracking) Numbers() []uint64 { return t.d.numbers(t.device, t.Base(), t.Number()) }

// treeChanges adds to a device's change tracking which of its snapshots exist.
type treeChanges struct {
	*cow.Changes
	d      *Daemon
	device string
}

func (c treeChanges) Since(num uint64) (iter.Seq2[fusefs.Run, error], bool) {
	runs, ok := c.Changes.Since(num)
	return treeRuns(runs), ok
}

func (c treeChanges) All() iter.Seq2[fusefs.Run, error] { return treeRuns(c.Changes.All()) }

func (c treeChanges) Numbers() []uint64 { return c.d.numbers(c.device, c.Base(), c.Number()) }

func treeRuns(runs iter.Seq2[cow.Run, error]) iter.Seq2[fusefs.Run, error] {
	return func(yield func(fusefs.Run, error) bool) {
		for r, err := range runs {
			if !yield(fusefs.Run(r), err) {
				return
			}
		}
	}
}

// numbers are the numbers of a device's existing snapshots from base to last,
// ascending.
func (d *Daemon) numbers(device string, base, last uint64) []uint64 {
	var found []uint64
	for _, s := range d.allSnapshots() {
		if i, ok := s.Image(device); ok {
			if n := i.Changes().Number(); base <= n && n <= last {
				found = append(found, n)
			}
		}
	}
	slices.Sort(found)
	return found
}
