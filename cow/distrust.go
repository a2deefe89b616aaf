// Devices whose files in the run directory nobody may believe.
//
// Where the run directory has no room for a device's state, or refuses it, the device is
// served all the same, with its state in memory (inmemory.go). What its directory holds is
// of the time before that, and nothing in these files says so: perhaps they can be neither
// changed nor removed. Later they could be used again, and would look sound: a block device
// does not tell what was written to it, and a file does not within a lease. So the catalogue
// has the device's name, which takes no room and no call. Who opens a device that it names begins
// anew, and takes the name out when that is done. Of a catalogue that is lost, or of another
// boot, all files of devices are removed, and what cannot be removed is distrusted.
// So is a device that was removed where its state could not be: what that holds may be older
// than the origin, and the lease file that says so (nostate.go) goes.
//
// Until Recover is called a start may fail, and be repeated when the files can be used
// again. So names are noted there, before the first write.

package cow

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// distrustWord is what the catalogue has of a device's name.
func distrustWord(name string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(name))
	return max(h.Sum64(), 1)
}

// findWordLocked is the offset of the first of these words that is w, or -1.
func (c *Catalogue) findWordLocked(w uint64) int {
	b := c.mem.Bytes()
	for at := catalogueDistrust; at < catalogueHeader; at += 8 {
		if wordAt(b, at).Load() == w {
			return at
		}
	}
	return -1
}

// distrusts says whether nobody may believe the files of the device called name.
func (c *Catalogue) distrusts(name string) (yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guarded(func() { yes = c.findWordLocked(distrustWord(name)) >= 0 })
	return yes
}

// distrust notes that nobody may believe the files of the device called name. (A catalogue
// that has faulted is empty, and so nobody believes anything.)
func (c *Catalogue) distrust(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.distrustLocked(name)
}

func (c *Catalogue) distrustLocked(name string) (err error) {
	w := distrustWord(name)
	c.guarded(func() {
		if c.findWordLocked(w) >= 0 {
			return
		}
		at := c.findWordLocked(0)
		if at < 0 {
			err = fmt.Errorf("the catalogue has no room to note that the files of device %s are not to be believed", name)
			return
		}
		wordAt(c.mem.Bytes(), at).Store(w)
	})
	c.did("distrust a device")
	return err
}

// trust takes the name out, also of what was doubted: the device has its origin, so nobody
// else has that, and its files are of now.
func (c *Catalogue) trust(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.doubted, name)
	w, noted := distrustWord(name), false
	c.guarded(func() {
		if at := c.findWordLocked(w); at >= 0 {
			wordAt(c.mem.Bytes(), at).Store(0)
			noted = true
		}
	})
	if noted {
		c.did("trust a device")
	}
}

// doubt is distrust as soon as it is certain that the start does not fail.
func (c *Catalogue) doubt(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.recovered {
		return c.distrustLocked(name)
	}
	if _, ok := c.doubted[name]; !ok {
		c.doubted[name] = nil
	}
	return nil
}

// distrustDoubted notes the names that were doubted.
func (c *Catalogue) distrustDoubted() (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recovered = true
	for name := range c.doubted { // which nobody adds to any more
		err = errors.Join(err, c.distrustLocked(name))
	}
	return err
}

// resumeInMemory has the devices begin that have their state in memory. It removes files,
// so nothing can fail any more.
func (c *Catalogue) resumeInMemory() {
	for _, d := range c.doubted {
		if d != nil {
			d.resumeInMemory()
		}
	}
}

// discardDevices removes what devices keep in the run directory, and distrusts what cannot
// be removed.
func (c *Catalogue) discardDevices() error {
	if c.dir == "" || os.RemoveAll(filepath.Join(c.dir, "devices")) == nil {
		return nil
	}
	names, err := c.deviceNames()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.distrust(name); err != nil {
			return err
		}
	}
	return nil
}

// deviceNames are those of the devices that have something in the run directory.
func (c *Catalogue) deviceNames() (names []string, err error) {
	if c.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(filepath.Join(c.dir, "devices"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}
