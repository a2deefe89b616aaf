// What a device keeps for the time after a loss of power, and for telling whether
// somebody else wrote to its origin meanwhile.
//
// In the state directory: the last checkpoint, and the record of regions that were
// written since. In the run directory: who the origin is, and a lease that ends a
// second after the last write. A write that finds its region recorded and both
// leases running costs a look at each; the others go the slow way, outside the
// gate, and are given up after Config.PreserveLimit as a snapstore is.
//
// Where the state cannot be written, the generation ends, so that nobody trusts
// after a reboot what could not be noted. That is noted, where it can be, by
// removing the state, and by an attribute of the origin.

package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync/atomic"
	"time"
)

const (
	// runLease is how long our own writes may stamp the origin after the last
	// one was let in; renewed when half of it is over.
	runLease = time.Second

	// stateLease is the same for what outlives the machine; it costs an fsync.
	stateLease = 30 * time.Second

	// checkpointEvery is how often the map is written down while it changes.
	checkpointEvery = time.Minute
)

// durable is what outlives the machine. It never changes; a device that cannot
// keep it any more has none.
type durable struct {
	disk    stateDisk
	dir     string
	regions *regions
	lease   atomic.Int64 // as regions.state.lease
}

func (u *durable) checkpointPath() string { return filepath.Join(u.dir, "map") }
func (u *durable) regionsPath() string    { return filepath.Join(u.dir, "regions") }

// covered says whether a write to [off, off+n) needs nothing to be noted first.
func (d *Device) covered(off, n int64) bool {
	now := time.Now().UnixNano()
	d.renewLease(now)
	u := d.durable.Load()
	return u == nil || u.regions.note(off, n) && u.lease.Load() > now
}

// renewLease lets our own writes stamp the origin for a while.
func (d *Device) renewLease(now int64) {
	if d.lease.Load() < now+int64(runLease/2) {
		d.lease.Store(now + int64(runLease))
	}
}

// cover notes what a write to [off, off+n) needs. It takes an fsync, and ends the
// generation where it fails.
func (d *Device) cover(off, n int64) {
	u := d.durable.Load()
	if u == nil {
		return
	}
	d.keepUp("record a region", u, func() error {
		if err := u.extend(time.Now()); err != nil {
			return err
		}
		return u.regions.add(off, n)
	})
}

// extend makes the lease run on.
func (u *durable) extend(now time.Time) error {
	if u.lease.Load() > now.Add(stateLease/2).UnixNano() {
		return nil
	}
	until := now.Add(stateLease)
	if err := u.regions.extend(until); err != nil {
		return err
	}
	u.lease.Store(until.UnixNano())
	return nil
}

// keepUp does something with the state that a write or a snapshot waits for, at
// most as long as for a snapstore.
func (d *Device) keepUp(what string, u *durable, f func() error) {
	done := make(chan error, 1)
	go func() { done <- f() }()
	late := time.NewTimer(d.cfg.PreserveLimit)
	defer late.Stop()
	var err error
	select {
	case err = <-done:
	case <-late.C:
		err = fmt.Errorf("no answer for %v", d.cfg.PreserveLimit)
	}
	if err != nil {
		d.endDurable(u, fmt.Errorf("%s: %w", what, err))
	}
}

// endDurable goes on without u, once. When it returns it is noted, if that is
// possible at all, that the generation has ended.
func (d *Device) endDurable(u *durable, why error) {
	d.ending.Lock()
	defer d.ending.Unlock()
	if !d.durable.CompareAndSwap(u, nil) {
		return
	}
	d.cfg.Log.Error("state cannot be written: change tracking will not outlive the machine", "err", why)
	noted := make(chan error, 1)
	generation := d.changes.Generation()
	go func() {
		noted <- errors.Join(u.discard(), d.file.noteEnded(generation))
	}()
	select {
	case err := <-noted:
		if err != nil {
			d.cfg.Log.Error("cannot note that the generation has ended", "err", err)
		}
	case <-time.After(d.cfg.PreserveLimit):
		d.cfg.Log.Error("cannot note that the generation has ended", "err", "no answer")
	}
	d.reason.Store(&why)
	d.poke()
}

// discard removes the state, durably.
func (u *durable) discard() error {
	err := errors.Join(removeFile(u.disk, u.checkpointPath()), removeFile(u.disk, u.regionsPath()))
	return errors.Join(err, u.disk.syncDir(u.dir))
}

// dropDurable goes on without durable state for a moment; keepDurable begins it
// anew. Until then a loss of power ends the generation. The caller holds keeping.
func (d *Device) dropDurable() {
	u := d.durable.Load()
	if u == nil {
		return
	}
	if err := u.discard(); err != nil {
		d.endDurable(u, err)
		return
	}
	d.durable.CompareAndSwap(u, nil)
	d.poke()
}

// restartDurable begins an empty record and writes the map down. Until that is
// done, there is a record without a map of its generation, which nobody trusts.
func (d *Device) restartDurable() error {
	if err := makeDir(d.cat.disk, d.cat.state, d.stateDir); err != nil {
		return err
	}
	u := &durable{disk: d.cat.disk, dir: d.stateDir}
	var err error
	// A snapshot that is being taken may not have found a record to reserve its
	// number in.
	u.regions, err = createRegions(u.disk, u.regionsPath(), regionsState{
		size: d.Size(), generation: d.changes.Generation(), number: d.changes.Number() + 1,
	})
	if err != nil {
		return err
	}
	// From now on writes are recorded; those in flight end before the map is
	// written down.
	d.durable.Store(u)
	return d.checkpoint()
}

// reopenDurable goes on with the record of a predecessor in the same boot, whose
// map is the device's already.
func (d *Device) reopenDurable() error {
	u := &durable{disk: d.cat.disk, dir: d.stateDir}
	r, err := openRegions(u.disk, u.regionsPath())
	if err != nil {
		return err
	}
	if r.state.generation != d.changes.Generation() || r.state.size != d.Size() {
		r.file.Close()
		return fmt.Errorf("%w: record of regions of another generation or size", ErrDamaged)
	}
	u.regions = r
	u.lease.Store(r.state.lease)
	d.durable.Store(u)
	return nil
}

func (d *Device) checkpointInfo(clean bool) (checkpointInfo, error) {
	id, err := d.file.identify(clean)
	if err != nil {
		return checkpointInfo{}, err
	}
	return checkpointInfo{
		generation: d.changes.Generation(), number: d.changes.Number(), base: d.changes.Base(),
		block: d.changes.BlockSize(), clean: clean, origin: id, boot: d.cat.boot,
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
	view := d.changes.View()
	defer view.Release()
	info.number, info.base, info.generation = view.Number(), view.Base(), view.Generation()
	if err := d.Flush(); err != nil {
		return err
	}
	if err := writeCheckpoint(u.disk, u.checkpointPath(), info, view); err != nil {
		return err
	}
	err = u.regions.drop(info.generation, func() bool { return d.writers.turn(d.stop) })
	if err != nil && !errors.Is(err, ErrStopping) {
		// Nobody knows which set of regions counts on the disk.
		err = fmt.Errorf("drop regions from the record: %w", err)
		d.endDurable(u, err)
	}
	return err
}

// closeDurable leaves the state of a clean end: nothing is written any more.
func (d *Device) closeDurable() error {
	id, err := d.file.identify(false)
	if err != nil {
		return err
	}
	d.lease.Store(id.changed) // whatever comes later is not ours
	u := d.durable.Swap(nil)
	if u == nil {
		return nil
	}
	defer u.regions.file.Close()
	if err := d.Flush(); err != nil {
		return err
	}
	info, err := d.checkpointInfo(true)
	if err != nil {
		return err
	}
	view := d.changes.View()
	defer view.Release()
	if err := writeCheckpoint(u.disk, u.checkpointPath(), info, view); err != nil {
		return err
	}
	u.regions.begin()
	u.regions.state.lease = info.origin.changed
	return u.regions.drop(info.generation, func() bool { return true })
}

// recoverDurable finds the map that was written down, after a reboot: it loads it
// into the device, with all recorded regions marked, and goes on with the record.
// An error says why it cannot be trusted, or (errBlank) that there is none.
func (d *Device) recoverDurable() error {
	u := &durable{disk: d.cat.disk, dir: d.stateDir}
	c, err := openCheckpoint(u.disk, u.checkpointPath())
	if errors.Is(err, fs.ErrNotExist) {
		return errBlank
	}
	if err != nil {
		return err
	}
	defer c.file.Close()
	r, err := openRegions(u.disk, u.regionsPath())
	if err != nil {
		return err
	}
	if err := d.recoverMap(c, r); err != nil {
		r.file.Close()
		return err
	}
	u.regions = r
	u.lease.Store(r.state.lease)
	d.durable.Store(u)
	return nil
}

func (d *Device) recoverMap(c *checkpointFile, r *regions) error {
	// Whatever comes of the rest, numbers go on, and leave one out.
	d.cfg.Number = max(d.cfg.Number, r.state.number+1, c.number+1)
	if r.state.generation != c.generation || r.state.size != c.origin.size {
		return fmt.Errorf("%w: checkpoint and record of regions do not belong together", ErrDamaged)
	}
	if d.cfg.TrackingBlock != 0 && d.cfg.TrackingBlock != c.block {
		return fmt.Errorf("it has tracking blocks of %d bytes, asked for are %d", c.block, d.cfg.TrackingBlock)
	}
	if ended, err := d.file.ended(); err == nil && ended == c.generation {
		return errors.New("writes could not be recorded any more")
	}
	clean := c.clean
	for i := range r.n {
		clean = clean && !hasBit(r.recorded, i)
	}
	now, err := d.file.identify(clean)
	if err != nil {
		return err
	}
	if err := c.origin.foreign(now, time.Unix(0, r.state.lease), c.boot == d.cat.boot, clean); err != nil {
		return err
	}
	mem, err := d.changesAt(c.block)
	if err != nil {
		return err
	}
	number := max(c.number, r.state.number)
	if d.changes, err = c.load(mem, number); err != nil {
		return err
	}
	for i := range r.n {
		if hasBit(r.recorded, i) {
			d.changes.Mark(i<<regionShift, 1<<regionShift)
		}
	}
	return nil
}

// keepDurable writes checkpoints while the device lives, and begins a new
// generation where the present one could not be kept.
func (d *Device) keepDurable() {
	defer d.running.Done()
	tick := time.NewTicker(checkpointEvery)
	defer tick.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-d.poked:
			d.renew()
		case <-tick.C:
		}
		select {
		case <-d.stop:
			return
		case d.keeping <- struct{}{}:
		}
		err := d.checkpoint()
		if d.durable.Load() == nil {
			err = d.restartDurable()
		}
		<-d.keeping
		if err != nil && !errors.Is(err, ErrStopping) {
			d.cfg.Log.Warn("write the change map down", "err", err)
		}
	}
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
