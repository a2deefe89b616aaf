// Snapshots: taking and destroying them.

package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"blksnap/cow"
	"blksnap/fusefs"
)

// takeSnapshot takes a snapshot at a client's request. It is destroyed again where the
// client has left before it was taken: nobody will know of it, and what the client had
// frozen for it may have been thawed.
func (d *Daemon) takeSnapshot(ctx context.Context, q SnapshotRequest) (SnapshotInfo, error) {
	s, err := d.take(q)
	if err != nil {
		return SnapshotInfo{}, err
	}
	if hasLeft(ctx) && !d.isStopping() {
		return SnapshotInfo{}, errors.Join(context.Canceled, d.destroy(s.Name(), true))
	}
	return d.describe(s), nil
}

// take takes a snapshot. Errors match EINVAL, EEXIST, ENOENT, ENOSPC, ETIMEDOUT
// and ESHUTDOWN.
func (d *Daemon) take(q SnapshotRequest) (*cow.Snapshot, error) {
	if err := q.check(); err != nil {
		return nil, err
	}
	s, err := d.takeChanging(q)
	if err != nil {
		return nil, err
	}
	d.record("snapshot-created", "", s.Name(),
		fmt.Sprintf("%s, writes held up for %s", plural(len(s.Images()), "device"), s.Held().Round(time.Microsecond)))
	return s, nil
}

// check refuses what no snapshot can be (EINVAL).
func (q *SnapshotRequest) check() error {
	if q.TTL < 0 {
		return refuse(syscall.EINVAL, "time to live of %s is less than nothing", q.TTL)
	}
	if q.Name == "" {
		return nil
	}
	return checkName("snapshot", q.Name)
}

func (d *Daemon) takeChanging(q SnapshotRequest) (*cow.Snapshot, error) {
	d.changing.Lock()
	defer d.changing.Unlock()
	name, chosen, err := d.choose(q.Name, q.Devices)
	if err != nil {
		return nil, err
	}
	if err := d.checkStore(); err != nil {
		return nil, err
	}
	s, err := d.cat.Take(name, chosen, cow.TakeOptions{Note: note{TTL: q.TTL}.encode(), Writable: q.Writable, MaxStore: q.MaxStore})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.snapshots = append(d.snapshots, s)
	d.mu.Unlock()
	return s, nil
}

// choose finds the devices for a snapshot, and a name if it has none. The
// caller holds changing, so both stay as they are.
func (d *Daemon) choose(name string, devices []string) (string, []*cow.Device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	exists := func(name string) bool { _, ok := d.snapshotLocked(name); return ok }
	switch {
	case d.isStopping():
		return "", nil, errStopping()
	case name == "":
		name = timeName(time.Now(), exists)
	case exists(name):
		return "", nil, refuse(syscall.EEXIST, "snapshot %s exists already", name)
	}
	var chosen []*cow.Device
	for n, dev := range d.devices {
		if len(devices) == 0 || slices.Contains(devices, n) {
			chosen = append(chosen, dev.Device)
		}
	}
	for _, n := range devices {
		if d.devices[n] == nil {
			return "", nil, unknownDevice(n)
		}
	}
	if len(chosen) == 0 {
		return "", nil, refuse(syscall.EINVAL, "there is no device to take a snapshot of")
	}
	return name, chosen, nil
}

// destroySnapshots destroys snapshots, those in use only if force is set. An
// unknown name is refused before any is destroyed. The error tells of each that is
// in use; the others are destroyed all the same.
func (d *Daemon) destroySnapshots(q DestroyRequest) error {
	for _, n := range q.Names {
		if _, err := d.snapshot(n); err != nil {
			return err
		}
	}
	names := slices.Clone(q.Names)
	slices.Sort(names)
	var errs []error
	for _, n := range slices.Compact(names) {
		errs = append(errs, d.destroy(n, q.Force))
	}
	return errors.Join(errs...)
}

// lateRelease is how long an image may still count as in use after its last
// user has closed it. The kernel tells of a closed file, and a socket of a gone
// client, some time later, and `cp IMAGE COPY; rmdir SNAPSHOT` has to work.
const lateRelease = 250 * time.Millisecond

// destroy destroys a snapshot. It is refused with EBUSY while one of its images
// is open or exported to a client, unless force is set: then those who use it
// get errors from now on.
func (d *Daemon) destroy(name string, force bool) error {
	err := d.destroyChanging(name, force)
	for begun := time.Now(); errors.Is(err, syscall.EBUSY) && time.Since(begun) < lateRelease; {
		time.Sleep(time.Millisecond)
		err = d.destroyChanging(name, force)
	}
	if err != nil {
		return err
	}
	d.record("snapshot-destroyed", "", name, "")
	d.noteTree(func(t *fusefs.Tree) { t.SnapshotDestroyed(name) })
	return nil
}

func (d *Daemon) destroyChanging(name string, force bool) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	s, err := d.snapshot(name)
	if err != nil {
		return err
	}
	if err := s.Destroy(force); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.snapshots = slices.DeleteFunc(d.snapshots, func(o *cow.Snapshot) bool { return o == s })
	return nil
}

// snapshot returns the snapshot called name.
func (d *Daemon) snapshot(name string) (*cow.Snapshot, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, ok := d.snapshotLocked(name); ok {
		return s, nil
	}
	return nil, unknownSnapshot(name)
}

func unknownSnapshot(name string) error {
	return unknown("snapshot", name)
}

// allSnapshots are all snapshots, oldest first.
func (d *Daemon) allSnapshots() []*cow.Snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.snapshots)
}

// recoverSnapshots finds the snapshots of a daemon that was killed or upgraded.
func (d *Daemon) recoverSnapshots() error {
	found, absent, err := d.cat.Recover()
	if err != nil {
		return err
	}
	for _, name := range absent {
		d.log.Error("images of a device that is not there any more are lost", "device", name)
	}
	d.mu.Lock()
	d.snapshots = found
	d.mu.Unlock()
	for _, s := range found {
		d.record("snapshot-found", "", s.Name(), s.State())
	}
	return nil
}
