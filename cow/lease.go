// The lease: until when our own writes may stamp the origin.
//
// Every write stamps the origin's inode, and a start knows a write behind our back by a
// stamp that is beyond the lease (identity.go). There are two leases, because one of them
// costs an fsync: in the run directory, for a start in the same boot, and in the record
// of regions, for one after the machine went down.

package cow

import "time"

const (
	// runLease is how long the lease runs on that dies with the boot. It is renewed
	// when half of it is over.
	runLease = time.Second

	// stateLease is the same for the one that outlives the machine.
	stateLease = 30 * time.Second
)

// renewLease lets our own writes stamp the origin for a while.
func (d *Device) renewLease(now int64) {
	if d.lease.Load() < now+int64(runLease/2) {
		d.lease.Store(now + int64(runLease))
	}
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
	d.renewLease(time.Now().UnixNano())
	return f()
}
