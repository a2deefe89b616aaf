// The lease: until when our own writes may stamp the origin.
//
// Every write stamps the origin's inode, and a start knows a write behind our back by a
// stamp that is beyond the lease (identity.go). So the lease must run for as long as a
// write can be under way, and should end soon after: what somebody else writes within it
// is not noticed. There are two, because one of them costs an fsync:
//
//	in the run directory     a second, for a start in the same boot
//	in the record of regions 30 seconds, for one after the machine went down
//
// After a reboot the second one ends when the machine was started, if it runs on: what was
// stamped since is somebody else's. Where the clock was set back meanwhile our own stamps
// look like that, too, and a new generation begins, which is never wrong. (Not seen is who
// writes before a clock that was behind is set forward by more than the machine was up.)
//
// A write renews what runs out before it is let in. It may stamp the inode at any time
// until it returns: an origin can hang for minutes. While anybody is inside the gate a
// timer keeps both leases running. It goes on until they have run out, so a write that
// found them running needs no timer of its own.

package cow

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// runLease is how long the lease runs on that dies with the boot. It is renewed
	// when half of it is over, and looked after four times meanwhile.
	runLease  = time.Second
	leaseTick = runLease / 4

	// stateLease is the same for the one that outlives the machine.
	stateLease = 30 * time.Second
)

// renewLease lets our own writes stamp the origin for a while. The caller is inside the
// gate, or counts among stamping, until it has stamped it.
func (d *Device) renewLease(now int64) {
	if d.leased.Load() < now+int64(runLease/2) {
		d.prolongLease(now)
	}
}

func (d *Device) prolongLease(now int64) {
	d.leasing.Lock()
	defer d.leasing.Unlock()
	if d.ended {
		return // whoever stamps now was given up
	}
	until := now + int64(runLease)
	d.always(func() {
		wordAt(d.leaseMemory.Bytes(), writtenAt).Store(0)
		d.lease.Store(until)
	})
	d.counted.Store(false)
	d.leased.Store(until)
	d.tended.Store(now)
	d.leaseTimer.Reset(leaseTick)
}

// tendLease keeps the leases running while somebody may stamp the origin.
func (d *Device) tendLease() {
	d.tending.Lock()
	defer d.tending.Unlock()
	now := time.Now().UnixNano()
	until, last := d.leased.Load(), d.tended.Swap(now)
	switch {
	case d.untended: // Close ends the lease
	case d.writers.occupied() || d.stamping.Load() > 0:
		d.prolongLease(now)
		if u := d.durable.Load(); u != nil && u.ending(now) {
			d.extending.Do(func() { d.keepUp("extend the lease", u, u.extend) })
		}
	case until > now:
		d.leaseTimer.Reset(leaseTick)
	case until == 0:
		// All is counted, and nobody came to write since.
	case now-last > int64(runLease/2):
		// The machine slept, or we did. Who was inside has stamped the origin since,
		// and left before this look.
		d.prolongLease(now)
	case d.counts && !d.counted.Load():
		if now < until+int64(tallyAfter) {
			d.leaseTimer.Reset(leaseTick)
		} else {
			d.tallyLater(until) // where it is in vain, or dropped
			d.tallying.Do(d.tally)
		}
	}
}

// leaveLease has nobody keep the leases running any more.
func (d *Device) leaveLease() {
	d.tending.Lock()
	defer d.tending.Unlock()
	d.untended = true
	d.leaseTimer.Stop()
	d.leasing.Lock()
	defer d.leasing.Unlock()
	d.left = true
}

// ending says whether the lease that outlives the machine needs to be extended.
func (u *durable) ending(now int64) bool { return u.lease.Load() < now+int64(stateLease/2) }

// extend makes the lease run on that outlives the machine.
func (u *durable) extend() error {
	now := time.Now()
	if !u.ending(now.UnixNano()) {
		return nil
	}
	until := now.Add(stateLease)
	if err := u.regions.extend(until); err != nil {
		return err
	}
	u.lease.Store(until.UnixNano())
	return nil
}

// stamp calls f, which changes the origin without being inside the gate.
func (d *Device) stamp(f func() error) error {
	d.stamping.Add(1)
	defer d.stamping.Add(-1)
	d.renewLease(time.Now().UnixNano())
	return f()
}

// single runs one function at a time in the background, and drops those that come
// meanwhile.
type single struct {
	running atomic.Bool
	ended   sync.WaitGroup
}

func (s *single) Do(f func()) {
	if s.running.CompareAndSwap(false, true) {
		s.ended.Go(func() {
			defer s.running.Store(false)
			f()
		})
	}
}

// wait returns when nothing runs. Nobody calls Do any more.
func (s *single) wait() { s.ended.Wait() }
