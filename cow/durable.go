// What a device keeps for the time after a loss of power.
//
// In the state directory: the last checkpoint, and the record of regions that were
// written since. A write that finds its region recorded and the lease (lease.go)
// running costs a look at each; the others go the slow way, outside the gate, and are
// given up after Config.PreserveLimit as a snapstore is.
//
// Where the state cannot be written, the generation ends (ended.go). What a loss of
// power leaves is read in reboot.go.

package cow

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"blksnap/cbt"
)

// checkpointEvery is how often the map is written down while it changes.
const checkpointEvery = time.Minute

// durable is what outlives the machine. It never changes; a device that cannot
// keep it any more has none.
type durable struct {
	regions    *regions
	lease      atomic.Int64              // as regions.state.lease
	generation atomic.Pointer[uuid.UUID] // of the map that was written down
}

func newDurable(r *regions) *durable {
	u := &durable{regions: r}
	u.lease.Store(r.state.lease)
	u.generation.Store(&r.state.generation)
	return u
}

// mapPath and regionsPath are where the checkpoint and the record are.
func (d *Device) mapPath() string     { return filepath.Join(d.stateDir, "map") }
func (d *Device) regionsPath() string { return filepath.Join(d.stateDir, "regions") }

// covered says whether a write to [off, off+n) needs nothing to be noted first.
func (d *Device) covered(off, n int64) bool {
	now := time.Now().UnixNano()
	d.renewLease(now)
	u := d.durable.Load()
	return u == nil || u.regions.note(off, n) && u.lease.Load() > now
}

// cover notes what a write to [off, off+n) needs. It takes an fsync, and ends the
// generation where it fails.
func (d *Device) cover(off, n int64) {
	u := d.durable.Load()
	if u == nil {
		return
	}
	d.keepUp("record a region", u, func() error {
		if err := u.extend(); err != nil {
			return err
		}
		return u.regions.add(off, n)
	})
}

func (d *Device) checkpointInfo(clean bool) (checkpointInfo, error) {
	id, err := d.file.identify(clean)
	if err != nil {
		return checkpointInfo{}, err
	}
	return checkpointInfo{
		generation: d.changes().Generation(), number: d.changes().Number(), base: d.changes().Base(),
		block: d.changes().BlockSize(), clean: clean, origin: id, boot: d.cat.boot,
	}, nil
}

// checkpoint writes the map down and drops idle regions from the record. Where the
// map cannot be written, the record goes on growing and nothing is lost. Where the
// record cannot, the generation ends.
func (d *Device) checkpoint() error {
	u := d.durable.Load()
	if u == nil {
		return nil
	}
	u.regions.begin()
	if !d.writers.turn(d.stop) {
		return ErrStopping
	}
	info, err := d.checkpointInfo(false)
	if err != nil {
		return err
	}
	view := d.changes().View()
	defer d.always(view.Release)
	info.number, info.base, info.generation = view.Number(), view.Base(), view.Generation()
	// The origin must not look older than its map says after a loss of power.
	if err := d.flush(true); err != nil {
		return err
	}
	if err := d.writeMap(info, view); err != nil {
		return err
	}
	u.generation.Store(&info.generation)
	err = u.regions.drop(info.generation, func() bool { return d.writers.turn(d.stop) })
	if err != nil && !errors.Is(err, ErrStopping) {
		// Nobody knows which set of regions counts on the disk.
		err = fmt.Errorf("drop regions from the record: %w", err)
		d.endDurable(u, err, time.Now().Add(d.cfg.PreserveLimit))
	}
	return err
}

// writeMap is writeCheckpoint of the device's map.
func (d *Device) writeMap(info checkpointInfo, view *cbt.View) error {
	return d.place(d.mapPath(), func() error {
		err := errFaulted
		d.guarded(func() { err = writeCheckpoint(d.disk, d.mapPath(), info, view) })
		return err
	})
}

// place calls write, which makes a file at path with another name and renames it, and once
// more where directories with these names were in its way.
func (d *Device) place(path string, write func() error) error {
	err := write()
	if inTheWay(err) {
		if err := d.setAside(path, path+".new"); err != nil {
			return err
		}
		err = write()
	}
	return err
}

// restartDurable begins an empty record and writes the map down. Until that is done
// there is no map, so nobody trusts the record.
func (d *Device) restartDurable() error {
	d.awaitPredecessor()
	if err := makeDir(d.disk, d.cat.state, d.stateDir); err != nil {
		return err
	}
	d.awaitForgetting()
	if err := d.forgetMap(); err != nil {
		return err
	}
	d.noteBehind(false)
	generation := d.changes().Generation()
	if d.hasEnded(generation) {
		// A start found the map in the run directory, and goes on with it; or could not
		// tell what it found here, which is gone now.
		if err := d.stamp(func() error { return d.file.noteEnded(uuid.Nil) }); err != nil {
			return err
		}
	}
	// A snapshot that is being taken may not have found a record to reserve its number
	// in.
	var r *regions
	err := d.place(d.regionsPath(), func() (err error) {
		r, err = createRegions(d.disk, d.regionsPath(), regionsState{
			size: d.Size(), generation: generation, number: d.nextNumber(),
		})
		return err
	})
	if err != nil {
		return err
	}
	// From now on writes are recorded; those in flight end before the map is written
	// down.
	d.durable.Store(newDurable(r))
	return d.checkpoint()
}

// nextNumber is the highest number that the next snapshot may get: a new generation that
// begins with it leaves one out.
func (d *Device) nextNumber() uint64 { return d.changes().Number() + 2 }

// closeDurable leaves the state of a clean end: nothing is written any more. That the
// state cannot be written is no reason to call it another: what was recorded is still
// there, and is read once more after a reboot.
func (d *Device) closeDurable() error {
	err := d.leave()
	id, ierr := d.file.identify(false)
	if ierr == nil {
		d.endsWith(id.changed)
		ierr = d.replaceLease() // else the next start takes the device for a new one
	}
	if n := d.countWritten(); n != 0 {
		d.always(func() { wordAt(d.leaseMemory.Bytes(), writtenAt).Store(n) })
	}
	return errors.Join(err, ierr)
}

// endsWith notes a clean end after which the origin's change time is changed: whatever comes
// later is not ours.
func (d *Device) endsWith(changed int64) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	d.ended = true
	d.always(func() {
		d.lease.Store(changed)
		wordAt(d.leaseMemory.Bytes(), leftAt).Store(1)
	})
}

// leave is closeDurable but for the lease in the run directory.
func (d *Device) leave() error {
	u := d.durable.Swap(nil)
	if u == nil {
		return nil
	}
	deadline := time.Now().Add(d.cfg.PreserveLimit)
	defer func() { within(time.Until(deadline), u.regions.file.Close) }() // which the end of the lease is written to
	if err := d.flush(true); err != nil {
		d.endLease(u, deadline)
		return err
	}
	err := within(d.cfg.PreserveLimit/2, func() error { return d.writeLast(u) })
	if err != nil {
		d.cfg.Log.Warn("the change map cannot be written down: after a reboot more counts as changed", "err", err)
		d.endLease(u, deadline)
	}
	return nil
}

// writeLast is the checkpoint of a clean end.
func (d *Device) writeLast(u *durable) error {
	info, err := d.checkpointInfo(true)
	if err != nil {
		return err
	}
	view := d.changes().View()
	defer d.always(view.Release)
	if err := d.writeMap(info, view); err != nil {
		return err
	}
	u.regions.begin()
	u.regions.mu.Lock() // of whoever was given up over a disk that hung
	u.regions.state.lease = info.origin.changed
	u.regions.mu.Unlock()
	return u.regions.drop(info.generation, func() bool { return true })
}

// keepDurable writes checkpoints while the device lives, and begins a new generation
// where the present one could not be kept.
func (d *Device) keepDurable() {
	tick := time.NewTicker(checkpointEvery)
	defer tick.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-d.poked:
		case <-tick.C:
		}
		d.renew()
		select {
		case <-d.stop:
			return
		case d.keeping <- struct{}{}:
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { <-d.keeping }()
			d.writeDown()
		}()
		select {
		case <-done:
		case <-d.stop:
			// A state disk that hangs must not hold Close up for ever.
			within(d.cfg.PreserveLimit, func() error { <-done; return nil })
			return
		}
	}
}

// writeDown writes down what is to be kept. The caller holds keeping.
func (d *Device) writeDown() {
	d.writing.Store(time.Now().UnixNano())
	defer d.writing.Store(0)
	err := d.checkpoint()
	if d.durable.Load() == nil {
		err = d.restartDurable()
	}
	d.findUnreadTear()
	switch {
	case err == nil:
		d.trouble.Store(nil)
	case !errors.Is(err, ErrStopping):
		d.trouble.Store(&err)
		d.cfg.Log.Warn("write the change map down", "err", err)
	}
}

// Warning says what is wrong with what outlives the machine, empty where nothing is: the
// device is served all the same, but after a reboot more counts as changed, or all.
func (d *Device) Warning() string {
	switch err := d.notWritten(); {
	case err == nil:
		return ""
	case d.durable.Load() == nil:
		return fmt.Sprintf("change tracking does not outlive the machine: %v", err)
	default:
		return fmt.Sprintf("the change map cannot be written down: %v", err)
	}
}

// notWritten is why the map could not be written down last, or how long that takes already.
func (d *Device) notWritten() error {
	if err := d.trouble.Load(); err != nil {
		return *err
	}
	if began := d.writing.Load(); began != 0 {
		if took := time.Since(time.Unix(0, began)); took > d.cfg.PreserveLimit {
			return fmt.Errorf("%w for %v", errNoAnswer, took.Round(time.Second))
		}
	}
	return nil
}

// renew begins a new generation after the state could not be written.
func (d *Device) renew() {
	why := d.reason.Swap(nil)
	if why == nil {
		return
	}
	for d.Reset((*why).Error()) != nil {
		select {
		case <-d.stop:
			return
		case <-time.After(time.Second): // writes in flight hang: try again
		}
	}
}

// poke has keepDurable look after the state now.
func (d *Device) poke() {
	select {
	case d.poked <- struct{}{}:
	default:
	}
}
