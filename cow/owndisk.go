// The state disk, for one device.
//
// Who waits for a state disk that hangs gives the call up and goes on, and the device may
// be removed, and another one added with its name, before that call has come back. So the
// calls of a device that change what is in its directory end with its removal: those that
// come later are refused, and those under way are waited for before its files go. Until
// they are gone, the next device of that name keeps nothing, and believes nothing that it
// finds there.

package cow

import "sync"

// ownDisk is the state disk for one device, until end.
type ownDisk struct {
	stateDisk

	changing sync.WaitGroup // calls that change something

	mu    sync.Mutex // protects ended; never held across I/O
	ended bool
}

// end refuses all changes from now on, and waits for those under way.
func (k *ownDisk) end() {
	k.mu.Lock()
	k.ended = true
	k.mu.Unlock()
	k.changing.Wait()
}

// change calls f, which changes what is in the device's directory.
func (k *ownDisk) change(f func() error) error {
	k.mu.Lock()
	ended := k.ended
	if !ended {
		k.changing.Add(1)
	}
	k.mu.Unlock()
	if ended {
		return ErrStopping
	}
	defer k.changing.Done()
	return f()
}

func (k *ownDisk) open(path string, create bool) (f durableFile, err error) {
	if !create {
		return k.stateDisk.open(path, false)
	}
	err = k.change(func() (err error) {
		f, err = k.stateDisk.open(path, true)
		return err
	})
	return f, err
}

func (k *ownDisk) rename(from, to string) error {
	return k.change(func() error { return k.stateDisk.rename(from, to) })
}

func (k *ownDisk) remove(path string) error {
	return k.change(func() error { return k.stateDisk.remove(path) })
}

func (k *ownDisk) mkdir(dir string) error {
	return k.change(func() error { return k.stateDisk.mkdir(dir) })
}

// leave notes that the state of a device called name is being removed, until done is
// called.
func (c *Catalogue) leave(name string) (done func()) {
	gone := make(chan struct{})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving[name] = gone
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.leaving[name] == gone {
			delete(c.leaving, name)
		}
		close(gone)
	}
}

// awaitPredecessor waits until the state of a device that had the name before, and was
// removed, is gone.
func (d *Device) awaitPredecessor() {
	if d.predecessor != nil {
		<-d.predecessor
	}
}
