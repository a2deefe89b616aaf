// What an operator is told of a device: events, and that it failed.

package cow

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// Event is something that an operator or a script may want to react to.
type Event struct {
	Time     time.Time
	Kind     string // one of the Event constants
	Device   string
	Snapshot string // empty where no snapshot is concerned
	Text     string
}

// Kinds of events.
const (
	EventDeviceFailed       = "device-failed"
	EventSnapshotOverflowed = "snapshot-overflowed"
	EventSnapshotFailed     = "snapshot-failed"
	EventGeneration         = "generation"      // a new generation of the change map
	EventRollbackFailed     = "rollback-failed" // the device is between two states
)

// originError notes that the origin failed a request and returns the error to
// answer it with. Lack of space under a sparse file is no failure of the device.
func (d *Device) originError(op string, off int64, err error) error {
	if errors.Is(err, os.ErrClosed) {
		return ErrStopping
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // the origin was cut short behind our back
	}
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		d.fail(fmt.Sprintf("%s at %d: %v", op, off, cause(err)))
	}
	return fmt.Errorf("%s %s at %d: %w", op, d.name, off, err)
}

// fail marks the device as failed, once. Its requests are still tried, each
// answered for itself; what is marked is that the device needs a look.
func (d *Device) fail(why string) {
	if !d.failure.CompareAndSwap(nil, &why) {
		return
	}
	d.cfg.Log.Error("device failed", "err", why)
	d.event(EventDeviceFailed, "", why)
}

func (d *Device) event(kind, snapshot, text string) {
	if d.cfg.Notify != nil {
		d.cfg.Notify(Event{time.Now(), kind, d.name, snapshot, text})
	}
}
