// What a start finds in the state directory.
//
// In the same boot the map is in the run directory, and only the record goes on. After a
// reboot the map is the one that was written down, with all recorded regions marked: in
// these nobody knows what reached the disk. Both files and the origin have to fit
// together; where they do not a new generation begins, with numbers that go on from the
// highest that either knows.

package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"
)

// reopenRecord is reopenDurable, unless the lease file mem says that this does not know of
// all writes.
func (d *Device) reopenRecord(mem *memory) {
	err := leftBehind(mem)
	if err == nil {
		err = d.reopenDurable()
	}
	if err != nil {
		d.cfg.Log.Warn("the record of writes does not go on", "err", err)
	}
}

// reopenDurable goes on with the record of a predecessor in the same boot, whose map is
// the device's already.
func (d *Device) reopenDurable() error {
	generation := d.changes().Generation()
	if d.hasEnded(generation) {
		return errEnded
	}
	c, err := openCheckpoint(d.promptDisk(), d.mapPath())
	if err != nil {
		return err
	}
	defer c.file.Close()
	r, err := openRegions(d.promptDisk(), d.regionsPath())
	if err == nil {
		err = d.heal(r)
	}
	if err != nil {
		return err
	}
	if c.generation != generation || r.state.generation != generation || r.state.size != d.Size() {
		r.file.Close()
		return fmt.Errorf("%w: the record of regions is of another generation or size", ErrDamaged)
	}
	d.goOnWith(r)
	return nil
}

// heal makes a record that was found whole, or closes it.
func (d *Device) heal(r *regions) error {
	disk := d.promptDisk()
	err := disk.patience.call(disk.limit, r.heal, nil)
	if err != nil {
		r.file.Close()
	}
	return err
}

// goOnWith goes on with a record that was found.
func (d *Device) goOnWith(r *regions) {
	r.file = r.file.(promptFile).patient()
	d.durable.Store(newDurable(r))
}

// hasEnded says whether it is noted with the origin that a generation has ended.
func (d *Device) hasEnded(generation uuid.UUID) bool {
	ended, err := d.file.ended()
	return err == nil && (ended == generation || ended == uuid.Max)
}

// errEnded is of a generation that ended while the map could not be removed.
var errEnded = errors.New("writes could not be recorded any more")

// recoverDurable finds the map that was written down, after a reboot: it loads it into
// the device, with all recorded regions marked, and goes on with the record. An error
// says why it cannot be trusted, or (errBlank) that there is none. lease is the one from
// the run directory, zero where that has none, and behind what that says of others who
// wrote.
func (d *Device) recoverDurable(lease time.Time, behind error) error {
	r, rerr := openRegions(d.promptDisk(), d.regionsPath())
	if rerr == nil {
		// Whatever comes of the rest, numbers go on, and leave one out.
		d.cfg.Number = max(d.cfg.Number, r.state.number+1)
		rerr = d.heal(r)
	}
	c, err := openCheckpoint(d.promptDisk(), d.mapPath())
	if err == nil {
		d.cfg.Number = max(d.cfg.Number, c.number+1)
		defer c.file.Close()
	}
	if rerr != nil || err != nil {
		if rerr == nil {
			r.file.Close()
		}
		return whyNot(err, rerr)
	}
	if behind == nil {
		behind = d.recoverMap(c, r, lease)
	}
	if err := behind; err != nil {
		r.file.Close()
		return err
	}
	d.goOnWith(r)
	return nil
}

// whyNot says what it means that checkpoint or record cannot be opened.
func whyNot(checkpoint, record error) error {
	none, alone := errors.Is(checkpoint, fs.ErrNotExist), errors.Is(record, fs.ErrNotExist)
	switch {
	case none && alone:
		return errBlank
	case none && record == nil:
		return errors.New("the change map was given up before the machine went down")
	case checkpoint != nil:
		return checkpoint
	}
	return record
}

func (d *Device) recoverMap(c *checkpointFile, r *regions, run time.Time) error {
	if r.state.generation != c.generation || r.state.size != c.origin.size {
		return fmt.Errorf("%w: checkpoint and record of regions do not belong together", ErrDamaged)
	}
	if d.cfg.TrackingBlock != 0 && d.cfg.TrackingBlock != c.block {
		return fmt.Errorf("it has tracking blocks of %d bytes, asked for are %d", c.block, d.cfg.TrackingBlock)
	}
	if d.hasEnded(c.generation) {
		return errEnded
	}
	clean := c.clean
	for i := range r.n {
		clean = clean && !hasBit(r.recorded, i)
	}
	now, err := d.file.identify(clean)
	if err != nil {
		return err
	}
	if !now.isFile() && d.cat.distrusts(allBlock) {
		return errUnknown
	}
	lease, sameBoot := r.state.lease, c.boot == d.cat.boot
	if sameBoot && !clean && run.IsZero() && !now.isFile() {
		return errors.New("what the run directory knew of the origin is lost: nobody knows who wrote to it last")
	}
	switch {
	case sameBoot && !clean && run.IsZero():
		lease = 0 // it would run on for much longer than we did
	case sameBoot && !clean:
		lease = min(lease, run.UnixNano())
	case !sameBoot && d.cat.booted != 0:
		lease = min(lease, d.cat.booted) // who wrote since the machine was started is not us
	}
	// What was there when the map was written down is ours: there may have been no write
	// since that needed the lease.
	lease = max(lease, c.origin.changed)
	if err := c.origin.foreign(now, time.Unix(0, lease), sameBoot, clean); err != nil {
		if sameBoot && !clean && run.IsZero() && now.isFile() && now.changed > lease {
			return errors.New("the origin was written, and what the run directory knew of it is lost: nobody knows who wrote last")
		}
		return err
	}
	mem, err := d.changesAt(c.block)
	if err != nil {
		return err
	}
	number := max(c.number, r.state.number)
	m, err := c.load(mem, number)
	if err != nil {
		return err
	}
	d.tracked.Store(m)
	for i := range r.n {
		if hasBit(r.recorded, i) {
			d.changes().Mark(i<<regionShift, 1<<regionShift)
		}
	}
	return nil
}

// endFound sees to it that nobody trusts after the next reboot what was found and is
// not gone on with: from now on writes are not recorded there. Where the state directory
// does not even say what that is, all that was there until now has ended.
func (d *Device) endFound() {
	if d.stateDir == "" || d.durable.Load() != nil {
		return
	}
	generation := uuid.Nil
	c, err := openCheckpoint(d.promptDisk(), d.mapPath())
	switch {
	case err == nil:
		generation = c.generation
		c.file.Close()
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrDamaged):
		generation = uuid.Max // it may be read another time
	}
	limit := d.cfg.PreserveLimit / 2
	if d.cat.patience.hangs() {
		go d.forgetter()() // whenever it answers: it would be waited for in vain
		err = within(limit, func() error {
			return d.stamp(func() error { return d.file.noteEnded(uuid.Max) })
		})
	} else {
		err = d.noteEnded(generation, time.Now().Add(limit))
	}
	if err != nil {
		d.cfg.Log.Error("cannot note that the generation has ended", "err", err)
	}
}
