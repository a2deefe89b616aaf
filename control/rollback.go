// Rolling devices back to a snapshot, while nobody uses them.
//
// The engine does it (cow/rollback.go). Here it is seen to that no client is
// connected meanwhile, because it would go on with a content that it has never seen,
// that what a predecessor has begun goes on, and that it is told.
//
// A rollback belongs to the daemon, not to who asked for it: it goes on when they
// leave, and after a stop with the next start.

package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"blksnap/cow"
)

// disconnectLimit is how long requests of clients that are disconnected may take.
const disconnectLimit = 10 * time.Second

// rollBack rolls the devices of a snapshot back to it, those that are named, or all.
// With clients on one of them it is refused with EBUSY and nothing has changed, unless
// force is set: then they are disconnected. The error tells of each device that failed.
func (d *Daemon) rollBack(ctx context.Context, name string, q RollbackRequest) (RollbackInfo, error) {
	chosen, err := d.reserveRollback(name, q)
	for begun := time.Now(); errors.Is(err, syscall.EBUSY) && time.Since(begun) < lateRelease; {
		time.Sleep(time.Millisecond)
		chosen, err = d.reserveRollback(name, q)
	}
	if err != nil {
		return RollbackInfo{}, err
	}
	if err := d.disconnectAll(chosen); err != nil {
		d.releaseRollbacks(chosen...)
		d.rollbacks.Done()
		return RollbackInfo{}, err
	}
	var info RollbackInfo
	for _, r := range chosen {
		info.Devices = append(info.Devices, r.dev.Name())
	}
	select {
	case err := <-d.startRollbacks(chosen, ""):
		return info, err
	case <-d.stopping:
		return RollbackInfo{}, interrupted(chosen)
	case <-ctx.Done():
		return RollbackInfo{}, ctx.Err()
	}
}

// rollback is that of one device.
type rollback struct {
	dev      *device
	image    *cow.Image
	snapshot string
}

// reserveRollback lets no new client to the devices, until releaseRollbacks, and adds
// to rollbacks.
func (d *Daemon) reserveRollback(name string, q RollbackRequest) ([]rollback, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.isStopping() {
		return nil, errStopping()
	}
	s, ok := d.snapshotLocked(name)
	if !ok {
		return nil, unknownSnapshot(name)
	}
	for _, n := range q.Devices {
		if _, ok := s.Image(n); !ok {
			return nil, refuse(syscall.ENOENT, "snapshot %s has no device %q", name, clip(n))
		}
	}
	var chosen []rollback
	for _, i := range s.Images() {
		n := i.Device().Name()
		if len(q.Devices) > 0 && !slices.Contains(q.Devices, n) {
			continue
		}
		dev := d.devices[n]
		switch {
		case dev.rolling != "":
			return nil, errRollingBack(dev)
		case dev.clients > 0 && !q.Force:
			return nil, refuse(syscall.EBUSY, "device %s has %s open", n, plural(dev.clients, "NBD connection"))
		}
		chosen = append(chosen, rollback{dev, i, name})
	}
	if len(chosen) == 0 {
		return nil, refuse(syscall.EINVAL, "snapshot %s has no image", name)
	}
	for _, r := range chosen {
		r.dev.rolling = name
	}
	d.rollbacks.Add(1)
	return chosen, nil
}

// errRollingBack refuses a device. The caller holds Daemon.mu.
func errRollingBack(dev *device) error {
	return refuse(syscall.EBUSY, "device %s is being rolled back to %s", dev.Name(), dev.rolling)
}

// releaseRollbacks lets clients in again.
func (d *Daemon) releaseRollbacks(chosen ...rollback) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range chosen {
		r.dev.rolling = ""
	}
}

// disconnectAll returns when no client is connected to the devices any more.
func (d *Daemon) disconnectAll(chosen []rollback) error {
	d.mu.Lock()
	disconnect := d.disconnect
	d.mu.Unlock()
	if disconnect == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), disconnectLimit)
	defer cancel()
	for _, r := range chosen {
		if err := disconnect(ctx, r.dev.Name()); err != nil {
			return fmt.Errorf("disconnect the clients of %s: %w", r.dev.Name(), err)
		}
	}
	return nil
}

func (d *Daemon) setDisconnect(f func(ctx context.Context, export string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disconnect = f
}

// startRollbacks rolls devices back side by side, so that all are pending soon, and
// a start goes on with all of them. The channel gets the error when the last has
// ended, which then leaves rollbacks.
func (d *Daemon) startRollbacks(chosen []rollback, how string) <-chan error {
	done := make(chan error, 1)
	go func() {
		defer d.rollbacks.Done()
		errs := make([]error, len(chosen))
		var each sync.WaitGroup
		for k, r := range chosen {
			each.Go(func() { errs[k] = d.runRollback(r, how) })
		}
		each.Wait()
		done <- errors.Join(errs...)
	}()
	return done
}

// runRollback rolls one device back and lets clients in again.
func (d *Daemon) runRollback(r rollback, how string) error {
	d.record("rollback-begun", r.dev.Name(), r.snapshot, how)
	begun := time.Now()
	err := r.image.Rollback()
	if errors.Is(err, cow.ErrStopping) {
		return err // and no client comes in before the next start has gone on
	}
	d.releaseRollbacks(r)
	text := "done in " + time.Since(begun).Round(time.Millisecond).String()
	if err != nil {
		text = "failed: " + err.Error()
	}
	d.record("rollback-ended", r.dev.Name(), r.snapshot, text)
	return err
}

// interrupted says what comes of rollbacks when the daemon stops.
func interrupted(chosen []rollback) error {
	var pending []string
	for _, r := range chosen {
		if r.dev.RollingBack() != nil {
			pending = append(pending, r.dev.Name())
		}
	}
	if len(pending) == 0 {
		return errStopping()
	}
	return refuse(syscall.ESHUTDOWN, "the daemon is stopping, and goes on rolling back %s when it starts again", strings.Join(pending, ", "))
}

// awaitRollbacks waits for those that closing the devices ends.
func (d *Daemon) awaitRollbacks() error {
	return within(closeLimit, "end rollbacks", func() error {
		d.rollbacks.Wait()
		return nil
	})
}

// isRollingBack says whether a device is being rolled back to the snapshot, which
// cannot be destroyed then.
func (d *Daemon) isRollingBack(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, dev := range d.devices {
		if dev.rolling == name {
			return true
		}
	}
	return false
}

// resumeRollbacks goes on with what a predecessor has begun.
func (d *Daemon) resumeRollbacks() {
	d.mu.Lock()
	var pending []rollback
	for _, dev := range d.devices {
		image := dev.RollingBack()
		for _, s := range d.snapshots {
			if i, ok := s.Image(dev.Name()); ok && i == image {
				dev.rolling = s.Name()
				pending = append(pending, rollback{dev, i, s.Name()})
			}
		}
	}
	d.mu.Unlock()
	if len(pending) > 0 {
		d.rollbacks.Add(1)
		d.startRollbacks(pending, "going on")
	}
}
