// Losing images, so that the origin need not wait.

package cow

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"blksnap/store"
)

// fault is why an image has no health any more. It never changes.
type fault struct {
	kind  uint64 // one of the fault constants; faultNone: it ends with the process
	err   error  // what requests are answered with; matches one of the Err values
	state string // what the image's state says
}

var (
	overflowed = &fault{faultOverflowed, ErrOverflowed, "overflowed"}
	destroyed  = &fault{faultDestroyed, ErrDestroyed, "failed: destroyed"}
	stopping   = &fault{faultNone, ErrStopping, "failed: device is stopping"}
)

func failed(reason string) *fault {
	return &fault{faultFailed, fmt.Errorf("%w: %s", ErrFailed, reason), "failed: " + reason}
}

// lose breaks exactly the images that needed the blocks mask of chunk c, which
// could not be preserved because of err: those that reach as far as a block and
// are newer than the newest layer that holds it. The caller holds the chunk's lock,
// and changes the origin only afterwards.
func (d *Device) lose(c chunkNo, mask uint16, err error) {
	f := failed(err.Error())
	if errors.Is(err, store.ErrFull) || errors.Is(err, syscall.ENOSPC) {
		f = overflowed
	}
	d.mu.Lock()
	var lost []*Image
	for _, l := range slices.Backward(d.layers) {
		mask &^= l.table.load(c).mask()
		if l.image != nil && mask&^c.beyond(l.image.size) != 0 {
			lost = append(lost, l.image)
		}
	}
	d.mu.Unlock()
	for _, i := range lost {
		d.breakImage(i, f, err)
	}
}

// breakImage ends an image that is lost and tells about it, once.
func (d *Device) breakImage(i *Image, f *fault, err error) {
	if !i.end(f) {
		return
	}
	kind := EventSnapshotFailed
	if f == overflowed {
		kind = EventSnapshotOverflowed
	}
	d.cfg.Log.Error("snapshot lost", "snapshot", i.snapshot.name, "err", err)
	d.event(kind, i.snapshot.name, err.Error())
}
