// The end of a generation whose state cannot be written any more.
//
// What could not be noted must not be trusted after a reboot. So before the first write
// goes on that is not recorded, it is noted that the generation has ended, where that is
// possible: the map that was written down is removed, or an attribute of the origin
// names the generation (uuid.Max: whichever is there). Both are tried at once, because either
// disk may hang, and one of them is enough. (The record stays: it knows the last number.)
//
// One limit holds for everything that a write waits for here. Half of it is for
// recording, and what is left for noting that it did not work.

package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"
)

// errNoAnswer is of a disk that hangs.
var errNoAnswer = errors.New("no answer")

// within calls f and returns what it returns, or errNoAnswer after limit: then f goes
// on, and nobody waits for it any more.
func within(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case err := <-done:
		return err
	case <-late.C:
		return fmt.Errorf("%w for %v", errNoAnswer, limit)
	}
}

// keepUp does something with the state that a write or a snapshot waits for, at most
// as long as for a snapstore, and ends the generation where it fails.
func (d *Device) keepUp(what string, u *durable, f func() error) {
	deadline := time.Now().Add(d.cfg.PreserveLimit)
	if err := within(d.cfg.PreserveLimit/2, f); err != nil {
		d.endDurable(u, fmt.Errorf("%s: %w", what, err), deadline)
	}
}

// endDurable goes on without u, once. When it returns it is noted, if that is possible
// at all, that the generation has ended; until then writers have to record what they
// write.
func (d *Device) endDurable(u *durable, why error, deadline time.Time) {
	d.ending.Lock()
	defer d.ending.Unlock()
	if d.durable.Load() != u {
		return
	}
	d.cfg.Log.Error("state cannot be written: change tracking will not outlive the machine", "err", why)
	if err := d.noteEnded(*u.generation.Load(), deadline); err != nil {
		d.cfg.Log.Error("cannot note that the generation has ended", "err", err)
	}
	d.noteBehind(true)
	d.durable.CompareAndSwap(u, nil)
	d.reason.Store(&why)
	d.trouble.Store(&why)
	d.poke()
}

// noteEnded notes durably that the map of a generation, or, with uuid.Nil, of whichever
// is there, is not to be trusted after a reboot. It waits until the deadline.
func (d *Device) noteEnded(generation uuid.UUID, deadline time.Time) error {
	ways := []func() error{d.forgetter()}
	if generation != uuid.Nil {
		ways = append(ways, func() error {
			return d.stamp(func() error { return d.file.noteEnded(generation) })
		})
	}
	noted := make(chan error, len(ways))
	for _, way := range ways {
		go func() { noted <- way() }()
	}
	late := time.NewTimer(time.Until(deadline))
	defer late.Stop()
	var errs []error
	for range ways {
		select {
		case err := <-noted:
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		case <-late.C:
			return errors.Join(append(errs, errNoAnswer)...)
		}
	}
	return errors.Join(errs...)
}

// endLease sees to it that nothing that is done to the origin from now on looks like our
// own writes: by the record, or by noting that the generation has ended.
func (d *Device) endLease(u *durable, deadline time.Time) {
	id, err := d.file.identify(false)
	if err == nil {
		err = within(time.Until(deadline)/2, func() error { return u.regions.endLease(id.changed) })
	}
	if err != nil {
		err = d.noteEnded(*u.generation.Load(), deadline)
	}
	if err != nil {
		d.cfg.Log.Error("cannot note that nobody writes any more", "err", err)
	}
}

// forgetMap removes the map that was written down, durably.
func (d *Device) forgetMap() error {
	err := d.removeFile(d.mapPath())
	if err == nil {
		// Also where it was not there: who removed it may have been killed before
		// that was durable.
		err = d.disk.syncDir(d.stateDir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nor is the directory
	}
	return err
}

// removeFile removes the file at path, if it is there. A directory in its place is set
// aside.
func (d *Device) removeFile(path string) error {
	err := removeFile(d.disk, path)
	if inTheWay(err) {
		err = d.setAside(path)
	}
	return err
}

// setAside sets directories aside that are where files belong, and tells where they are.
func (d *Device) setAside(paths ...string) error {
	var errs []error
	for _, path := range paths {
		to, err := setAside(d.disk, path)
		if err == nil && to != "" {
			d.cfg.Log.Warn("a directory was in the place of a file of the state: it has another name now", "file", path, "to", to)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// forgetter is forgetMap for somebody who may not wait for its end, to be called once. The
// next map is not written down before that: it would be the one that is removed.
func (d *Device) forgetter() func() error {
	done := make(chan struct{})
	before := d.forgetting.Swap(&done)
	return func() error {
		defer close(done)
		if before != nil {
			<-*before
		}
		return d.forgetMap()
	}
}

// awaitForgetting waits for every forgetter that there is.
func (d *Device) awaitForgetting() {
	if c := d.forgetting.Load(); c != nil {
		<-*c
	}
}

// removeState removes all that outlives the machine, durably. When it begins, nobody else
// does anything there any more.
func (d *Device) removeState() error {
	d.awaitPredecessor()
	d.disk.end()
	if err := d.disk.removeAll(d.stateDir); err != nil {
		return err
	}
	err := d.disk.syncDir(filepath.Dir(d.stateDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// dropDurable goes on without durable state for a moment; keepDurable begins it anew.
// Until then a loss of power ends the generation. The caller holds keeping.
func (d *Device) dropDurable() {
	u := d.durable.Load()
	if u == nil {
		return
	}
	deadline := time.Now().Add(d.cfg.PreserveLimit)
	if err := within(d.cfg.PreserveLimit/2, d.forgetter()); err != nil {
		d.endDurable(u, fmt.Errorf("remove the change map: %w", err), deadline)
		return
	}
	d.durable.CompareAndSwap(u, nil)
	d.poke()
}

// holdDurable keeps others from replacing durable, or writing it down, until release.
func (d *Device) holdDurable() (release func(), err error) {
	late := time.NewTimer(d.cfg.PreserveLimit)
	defer late.Stop()
	select {
	case <-d.stop:
		return nil, ErrStopping
	case d.keeping <- struct{}{}:
		return func() { <-d.keeping }, nil
	case <-late.C:
		return nil, fmt.Errorf("the state directory: %w for %v: %w", errNoAnswer, d.cfg.PreserveLimit, syscall.ETIMEDOUT)
	}
}
