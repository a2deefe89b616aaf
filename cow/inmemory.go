// A device whose state the run directory does not take.
//
// The directory may be full when a device is new, or begins anew; a file of it may be one
// that nobody can open or change. An origin is served all the same: its change map, lease and
// layers are in anonymous memory, which nothing in the engine asks about. What outlives the
// machine is kept as ever. Snapshots can be taken, and end with the process: the catalogue
// counts their images, and the next start does not find them.
//
// The device begins a new generation, and so does the next start in the same boot: it knows
// neither what was written until the end nor who has written since (distrust.go). After a
// reboot the map that was written down goes on.

package cow

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// starting says whether Recover has not been called yet.
func (c *Catalogue) starting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.recovered
}

// refused says whether err is of a directory that does not take or give a file, rather than
// of what is in the file: that may be sound.
func refused(err error) bool {
	for _, errno := range []error{
		syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.ENOSPC, syscall.EDQUOT,
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// beginInMemory begins anew without the run directory. why says what is wrong with that.
func (d *Device) beginInMemory(why error) (lost, err error) {
	layers, lerr := d.numbers(layerName)
	dir := d.dir
	d.dir = ""
	if u := d.durable.Swap(nil); u != nil { // endFound ends it
		within(d.cfg.PreserveLimit, u.regions.file.Close)
	}
	if _, err = d.findWrittenDown(why, time.Time{}, why); err != nil {
		return nil, err // perhaps it was the origin that failed
	}
	d.inMemory = why
	d.cat.mu.Lock()
	d.cat.doubted[d.name] = d
	d.cat.mu.Unlock()
	d.cfg.Log.Warn("the run directory does not take the state: it is in memory, until the daemon ends; "+
		"make room, or see to it that the files can be written, and start the daemon anew", "file", dir, "err", why)
	if lerr == nil && len(layers) > 0 {
		d.tellLost(dir, why)
	}
	return fmt.Errorf("its state is in memory only: %w", why), nil
}

// resumeInMemory does what Open leaves undone of a device whose state is in memory, because
// a start that fails, and is repeated when the files can be used, must cost nothing.
func (d *Device) resumeInMemory() {
	// Perhaps that makes room. What stays nobody believes.
	os.RemoveAll(d.cat.deviceDir(d.name))
	d.endFound()
	d.beginKeeping()
}
