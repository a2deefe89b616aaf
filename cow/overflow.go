// Losing images, so that the origin need not wait.

package cow

import (
	"errors"
	"fmt"
	"slices"
	"strings"
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

// reason is what the image's layer notes.
func (f *fault) reason() string { return strings.TrimPrefix(f.state, "failed: ") }

// lose breaks exactly the images that needed the blocks mask of chunk c, which
// could not be preserved because of err: those that reach as far as a block and
// are newer than the newest layer that holds it. The caller holds the chunk's lock,
// and changes the origin only afterwards.
func (d *Device) lose(c chunkNo, mask uint16, err error) {
	f := failed(err.Error())
	if errors.Is(err, store.ErrFull) || errors.Is(err, syscall.ENOSPC) {
		f = overflowed
	}
	for _, i := range d.needing(c, mask) {
		d.breakImage(i, f, err)
	}
}

// needing is lose's list of images.
func (d *Device) needing(c chunkNo, mask uint16) (list []*Image) {
	d.mu.Lock()
	defer d.mu.Unlock() // also where memory faults
	for _, l := range slices.Backward(d.layers) {
		mask &^= l.table.load(c).mask()
		if l.image != nil && mask&^c.beyond(l.image.size) != 0 {
			list = append(list, l.image)
		}
	}
	return list
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
	d.tellBroken(i, kind, err)
}

func (d *Device) tellBroken(i *Image, kind string, err error) {
	d.cfg.Log.Error("snapshot lost", "snapshot", i.snapshot.name, "err", err)
	d.event(kind, i.snapshot.name, err.Error())
}
