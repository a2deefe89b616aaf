// Images: one device's content in one snapshot.

package cow

import (
	"fmt"
	"io"
	"sync/atomic"
	"syscall"

	"blksnap/cbt"
)

// Image is one device's content in one snapshot: what the device held at the
// snapshot's instant, for as long as the image is healthy, and what was written to
// the image since, where it is writable. It is as long as the device was. Its
// methods may be called from many goroutines at once, also for ranges that overlap.
type Image struct {
	device   *Device
	snapshot *Snapshot
	size     int64
	layer    *layer
	overlay  *overlay // nil where the image is read-only
	frozen   *cbt.Frozen

	fault  atomic.Pointer[fault] // nil while the image is healthy
	gone   chan struct{}         // closed when it is destroyed
	extent extents

	users  int   // protected by Snapshot.mu
	blocks int64 // of the snapstore, where its snapshot has a limit; protected by Device.mu
	spent  bool  // its layer is (spent.go); protected by Device.mu
}

// Device is whose content it is.
func (i *Image) Device() *Device { return i.device }

// Size is in bytes and constant.
func (i *Image) Size() int64 { return i.size }

// State is "ok", "overflowed", or "failed: " and why.
func (i *Image) State() string {
	if f := i.fault.Load(); f != nil {
		return f.state
	}
	return "ok"
}

// Err is nil while the image is healthy, else what its requests are answered
// with.
func (i *Image) Err() error {
	if f := i.fault.Load(); f != nil {
		return f.err
	}
	return nil
}

// Gone is closed when the image is destroyed.
func (i *Image) Gone() <-chan struct{} { return i.gone }

// Acquire says that the image is in use, so that destroying it without force is
// refused. It fails where the image is destroyed or lost.
func (i *Image) Acquire() error {
	i.snapshot.mu.Lock()
	defer i.snapshot.mu.Unlock()
	if i.snapshot.destroyed {
		return ErrDestroyed
	}
	if err := i.Err(); err != nil {
		return err
	}
	i.users++
	return nil
}

// Release takes back one Acquire.
func (i *Image) Release() {
	i.snapshot.mu.Lock()
	defer i.snapshot.mu.Unlock()
	i.users--
}

// busyLocked says why the image's snapshot cannot be destroyed. The caller holds
// Snapshot.mu.
func (i *Image) busyLocked(force bool) error {
	switch {
	case i.device.rollback.Load() == i:
		return fmt.Errorf("image of %s: %w", i.device.name, ErrRollback)
	case i.users > 0 && !force:
		return fmt.Errorf("image of %s is in use: %w", i.device.name, syscall.EBUSY)
	}
	return nil
}

// ReadAt is Read by the rules of io.ReaderAt: at the end of the image it returns
// io.EOF.
func (i *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read image at %d: %w", off, syscall.EINVAL)
	}
	n := len(p)
	if rest := max(0, i.Size()-off); int64(n) > rest {
		n = int(rest)
	}
	if n > 0 {
		if err := i.Read(p[:n], off); err != nil {
			return 0, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Writable says whether the image can be written to. Where it cannot, everything
// that would change it fails with EROFS.
func (i *Image) Writable() bool { return i.overlay != nil }

// ReadOnly is the opposite of Writable.
func (i *Image) ReadOnly() bool { return !i.Writable() }

// Flush returns nil while the image is healthy. What was written to it goes where
// the snapstore is, and with it.
func (i *Image) Flush() error { return i.Err() }

// Sync is Flush.
func (i *Image) Sync() error { return i.Flush() }

// Cache is a hint that the range will be read soon.
func (i *Image) Cache(off, n int64) error {
	i.device.file.willNeed(off, n)
	return i.Err()
}

// end takes the image's health away and says whether it had any. From then on
// its requests fail, writers preserve nothing for it, and what only it needed
// goes back to the snapstore. When end returns, whoever took the health away, that
// it is gone is noted where a killed process leaves it.
func (i *Image) end(f *fault) bool {
	i.device.mu.Lock()
	defer i.device.mu.Unlock()
	if i.fault.Load() != nil {
		return false
	}
	i.noteFaultLocked(f)
	if i.fault.Load() != f {
		return false // memory faulted: all images are lost
	}
	i.device.retireImageLocked(i)
	return true
}

func (i *Image) noteFaultLocked(f *fault) {
	if f.kind != faultNone {
		if !i.device.guardedLocked(func() { i.layer.setFault(f.kind, f.reason()) }) {
			return
		}
		i.device.cat.did("note a fault")
	}
	i.fault.Store(f)
}

// destroy ends the image, also if it was lost before.
func (i *Image) destroy() {
	if !i.end(destroyed) {
		i.bury()
	}
	close(i.gone)
	i.device.always(i.frozen.Release)
	i.device.cat.did("release a frozen map")
}
