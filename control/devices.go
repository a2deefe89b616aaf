// Devices: adding and removing them while others work.

package control

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"blksnap/cow"
	"blksnap/fusefs"
)

// addDevice puts an origin under tracking. Its change map goes on where it is
// certain that nobody wrote to the origin meanwhile. added says that this is at run
// time, so that the device is back after a restart.
func (d *Daemon) addDevice(ctx context.Context, q DeviceRequest, added bool) (DeviceInfo, error) {
	if err := checkName("device", q.Name); err != nil {
		return DeviceInfo{}, err
	}
	if err := q.check(); err != nil {
		return DeviceInfo{}, err
	}
	if !filepath.IsAbs(q.Origin) {
		return DeviceInfo{}, refuse(syscall.EINVAL, "origin %q of device %s is not an absolute path", clip(q.Origin), q.Name)
	}
	if err := d.reserve(ctx, q.Name); err != nil {
		return DeviceInfo{}, err
	}
	dev, err := d.openDevice(ctx, q)
	d.mu.Lock()
	delete(d.adding, q.Name)
	if err == nil && d.isStopping() {
		err = errStopping()
	}
	if err == nil {
		d.devices[q.Name] = &device{Device: dev, request: q, added: added}
	}
	d.mu.Unlock()
	if err != nil {
		if dev != nil {
			dev.Close()
		}
		return DeviceInfo{}, fmt.Errorf("add device %s: %w", q.Name, err)
	}
	d.noteMembers()
	d.record("device-added", q.Name, "", q.Origin)
	return d.deviceInfo(q.Name)
}

// reserve keeps name for a device that is being opened, which may take long. It waits
// while a device of that name is being removed, with files that are called the same.
func (d *Daemon) reserve(ctx context.Context, name string) error {
	for {
		gone, err := d.tryReserve(name)
		if gone == nil {
			return err
		}
		select {
		case <-gone:
		case <-ctx.Done():
			return refuse(syscall.EBUSY, "device %s is still being removed", name)
		}
	}
}

// tryReserve is reserve for now; gone is what to wait for.
func (d *Daemon) tryReserve(name string) (gone <-chan struct{}, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.isStopping():
		return nil, errStopping()
	case d.removing[name] != nil:
		return d.removing[name], nil
	case d.devices[name] != nil || d.adding[name]:
		return nil, refuse(syscall.EEXIST, "device %s exists already", name)
	}
	d.adding[name] = true
	return nil, nil
}

func (d *Daemon) openDevice(ctx context.Context, q DeviceRequest) (*cow.Device, error) {
	if err := d.checkOriginFree(q.Origin); err != nil {
		return nil, err
	}
	o, err := afterEnd(ctx, q.Origin, func() (*cow.Origin, error) { return cow.OpenOrigin(q.Origin) })
	if err != nil {
		return nil, err
	}
	return d.cat.Open(o, d.pool, cow.Config{
		Name:          q.Name,
		TrackingBlock: int64(q.TrackingBlock),
		Number:        d.firstNumber(),
		StoreWait:     given(q.StoreWait),
		Log:           d.log,
		Notify:        d.noteEngine,
	})
}

// checkOriginFree refuses an origin that we use ourselves, in words that tell
// more than its lock does.
func (d *Daemon) checkOriginFree(origin string) error {
	for _, p := range d.pool.Parts() {
		if sameStorage(origin, p.Spec.Path) {
			return refuse(syscall.EBUSY, "origin %s is a part of the snapstore", origin)
		}
	}
	for _, dev := range d.sortedDevices() {
		if sameStorage(origin, dev.Origin()) {
			return refuse(syscall.EBUSY, "origin %s is device %s already", origin, dev.Name())
		}
	}
	return nil
}

// sameStorage says whether two paths lead to the same file or block device.
func sameStorage(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	if err != nil {
		return false
	}
	if os.SameFile(x, y) {
		return true
	}
	const block = os.ModeDevice
	return x.Mode().Type() == block && y.Mode().Type() == block &&
		x.Sys().(*syscall.Stat_t).Rdev == y.Sys().(*syscall.Stat_t).Rdev
}

// firstNumber is the number that a new device's snapshots count from. Nobody
// knows the last number that an earlier process gave to a snapshot, so it is the
// time in microseconds: taking a snapshot takes longer than one, so numbers
// never overtake the clock, and what starts later counts from above them. The
// first number is given to no snapshot: one that was is from before the device's
// generation, and must be below its base.
func (d *Daemon) firstNumber() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return max(uint64(time.Now().UnixMicro()), d.number+1)
}

// removeDevice ends a device's tracking. With snapshots or clients it is
// refused.
func (d *Daemon) removeDevice(name string) error {
	dev, err := d.takeOut(name)
	if err != nil {
		return err
	}
	defer d.removed(name)
	d.noteTree(func(t *fusefs.Tree) { t.DeviceRemoved(name) })
	d.noteMembers()
	if err := dev.Remove(); err != nil {
		return err
	}
	d.record("device-removed", name, "", dev.Origin())
	return nil
}

// resizeDevice makes a device as long as its origin is. Clients see that when they
// connect again.
func (d *Daemon) resizeDevice(name string, q ResizeRequest) (DeviceInfo, error) {
	dev, err := d.device(name)
	if err != nil {
		return DeviceInfo{}, err
	}
	was := dev.Size()
	if q.Shrink != 0 {
		err = dev.Shrink(q.Shrink)
	} else {
		err = dev.Resize()
	}
	if err != nil {
		return DeviceInfo{}, err
	}
	if now := dev.Size(); now != was {
		d.record("device-resized", name, "", fmt.Sprintf("from %d to %d bytes", was, now))
	}
	return d.describeDevice(dev), nil
}

// takeOut takes a device that nobody uses out of the set. It still has to be
// removed; its name is free again after removed.
func (d *Daemon) takeOut(name string) (*device, error) {
	d.changing.Lock()
	defer d.changing.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	dev := d.devices[name]
	switch snaps := d.snapshotsOfLocked(name); {
	case dev == nil:
		return nil, unknownDevice(name)
	case len(snaps) > 0:
		return nil, refuse(syscall.EBUSY, "device %s has %s: %s", name, plural(len(snaps), "snapshot"), strings.Join(snaps, ", "))
	case dev.clients > 0:
		return nil, refuse(syscall.EBUSY, "device %s has %s open", name, plural(dev.clients, "NBD connection"))
	}
	delete(d.devices, name)
	d.removing[name] = make(chan struct{})
	d.number = max(d.number, dev.Tracking().Number())
	return dev, nil
}

// removed ends what takeOut has begun.
func (d *Daemon) removed(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.removing[name])
	delete(d.removing, name)
}

// snapshotsOfLocked names the snapshots that a device is in, oldest first. The
// caller holds mu.
func (d *Daemon) snapshotsOfLocked(device string) []string {
	names := []string{}
	for _, s := range d.snapshots {
		if _, ok := s.Image(device); ok {
			names = append(names, s.Name())
		}
	}
	return names
}

// device returns the device called name.
func (d *Daemon) device(name string) (*device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dev := d.devices[name]; dev != nil {
		return dev, nil
	}
	return nil, unknownDevice(name)
}

// sortedDevices are all devices, by name.
func (d *Daemon) sortedDevices() []*device {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.SortedFunc(maps.Values(d.devices), func(a, b *device) int { return strings.Compare(a.Name(), b.Name()) })
}

func unknownDevice(name string) error {
	return unknown("device", name)
}

func errStopping() error {
	return refuse(syscall.ESHUTDOWN, "the daemon is stopping")
}
