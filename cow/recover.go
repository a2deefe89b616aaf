// Finding again what a predecessor left in the run directory: it was killed at any
// instant, or ended.
//
// The catalogue says which snapshots there are; each device finds its layers, its
// images and its change map. What does not add up costs the device its snapshots or
// its generation, never its service: a start without any state serves the origin as
// well.
//
// Only Recover gives something up for the reason that it is not there now, be it a
// part of the snapstore or a device: until then a start may fail, and be repeated
// with the right ones. So the slots that words name are put in use there, and
// nothing is reclaimed before.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"blksnap/cbt"
)

// readRecords finds the predecessor's snapshots and the free records.
func (c *Catalogue) readRecords() {
	for r := range c.records() {
		state := r.state()
		info, err := decodeRecord(r)
		switch {
		case state > stateDying:
			c.damaged = fmt.Errorf("%w: catalogue: state %d of a record", ErrDamaged, state)
		case state >= stateLive && err != nil:
			c.damaged = fmt.Errorf("catalogue: %w", err)
		}
		if state != stateLive && state != stateDying || err != nil {
			// Prepared and not live: there is no such snapshot. What cannot be
			// read cannot be told from others; its layers become nameless.
			c.release(r)
			continue
		}
		c.found[info.id] = &Snapshot{
			catalogue: c, record: r, name: info.name, note: info.note,
			created: r.taken(), held: r.held(), lost: info.images,
		}
	}
}

// Forget gives up the predecessor's snapshots and what its devices left in the run
// directory, where it is not certain what its slots' numbers mean, and returns how
// many snapshots there were. It is called before devices are opened. What outlives
// the machine stays.
func (c *Catalogue) Forget() (int, error) {
	if err := c.discardDevices(); err != nil {
		return 0, fmt.Errorf("forget snapshots: %w", err)
	}
	n := len(c.found)
	for id, s := range c.found {
		delete(c.found, id)
		c.release(s.record)
	}
	return n, nil
}

// Recover returns the predecessor's snapshots, oldest first, with the images of
// all devices that were opened since; it is called once, before anything is
// written to them and before the snapstore is told to discard, when nothing else
// can fail any more. Images that need a part of the snapstore that is not there are
// lost. Snapshots that were being destroyed are destroyed. Devices that are not
// there, which absent names, have no images any more; a snapshot that lacks an image
// says so, also where it has none, until it is destroyed: who copies its images must
// not take the rest for all.
func (c *Catalogue) Recover() (snaps []*Snapshot, absent []string, err error) {
	names, err := c.deviceNames()
	if err == nil {
		err = c.distrustDoubted()
	}
	if err == nil {
		absent, err = c.forgetAbsent(names)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("forget images of devices that are not there: %w", err)
	}
	c.resumeInMemory()
	c.mu.Lock()
	waiting := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	for _, d := range waiting {
		d.resume()
	}
	for id, s := range c.found {
		delete(c.found, id)
		switch {
		case s.record.state() == stateDying:
			s.destroyed = true
			s.end()
		default:
			s.sortImages()
			snaps = append(snaps, s)
		}
	}
	slices.SortFunc(snaps, func(a, b *Snapshot) int { return a.created.Compare(b.created) })
	return snaps, absent, nil
}

// forgetAbsent removes the layers of those of the devices called names that were not
// opened, and returns these names. Nobody has put the slots in use that these layers name: from
// now on they are given to others, so no later start may look for images there.
func (c *Catalogue) forgetAbsent(names []string) (absent []string, err error) {
	for _, name := range names {
		c.mu.Lock()
		opened := c.opened[name]
		c.mu.Unlock()
		if opened {
			continue
		}
		n, err := c.forgetLayers(name)
		if err != nil {
			err = c.distrust(name)
		}
		if err != nil {
			return nil, err
		}
		if n > 0 {
			absent = append(absent, name)
		}
	}
	return absent, nil
}

// forgetLayers removes the layers of a device, and returns how many there were.
func (c *Catalogue) forgetLayers(name string) (n int, err error) {
	dir := c.deviceDir(name)
	numbers, err := numbersIn(dir, layerName)
	if errors.Is(err, syscall.ENOTDIR) {
		return 0, nil
	}
	for _, number := range numbers {
		err = errors.Join(err, os.Remove(layerPath(dir, layerName, number)))
	}
	if err == nil && len(numbers) > 0 { // last: until then a start finds that some are missing
		err = os.RemoveAll(filepath.Join(dir, registerName))
	}
	return len(numbers), err
}

// recoverState finds the device's state in its directory. An error says why it
// cannot be used, or (errBlank) that there is none.
//
// noted is the size that was noted of the origin.
func (d *Device) recoverState(noted int64) error {
	frozen, err := d.recoverChanges(noted)
	if err != nil {
		return fmt.Errorf("change map: %w", err)
	}
	if err := d.recoverLayers(frozen); err != nil {
		return err
	}
	for _, f := range frozen { // of snapshots that did not come about, or went
		f.Release()
	}
	return nil
}

// recoverChanges opens the change map and returns the frozen ones by number.
func (d *Device) recoverChanges(noted int64) (map[uint64]*cbt.Frozen, error) {
	if err := wholeFile(d.path("changes")); err != nil {
		return nil, err
	}
	mem, err := d.changesAt(cmp.Or(d.cfg.TrackingBlock, cbt.DefaultBlock))
	if err != nil {
		return nil, err
	}
	m, list, err := cbt.Open(mem)
	switch {
	case err != nil:
		return nil, err
	case d.cfg.TrackingBlock == 0 && m.BlockSize() != cbt.DefaultBlock:
		// It stays what it was, and needs as much address space.
		m.Close()
		d.cfg.TrackingBlock = m.BlockSize()
		return d.recoverChanges(noted)
	case m.Size() != d.Size() && m.Size() != noted && noted != d.Size():
		return nil, fmt.Errorf("it is of a device of %d bytes, this has %d", m.Size(), d.Size())
	}
	// Whatever comes of the rest, numbers go on, and leave one out: who asks for
	// the changes since the last snapshot must be told that they are not known.
	d.cfg.Number = max(d.cfg.Number, m.Number()+1)
	if d.cfg.TrackingBlock != 0 && d.cfg.TrackingBlock != m.BlockSize() {
		return nil, fmt.Errorf("it has tracking blocks of %d bytes, asked for are %d", m.BlockSize(), d.cfg.TrackingBlock)
	}
	if m.Size() != d.Size() { // resized, but for this; or by somebody else, which find sees
		if err := m.Resize(d.Size()); err != nil {
			return nil, err
		}
	}
	if m.Lost() {
		return nil, errors.New("there was no memory for a mark")
	}
	d.tracked.Store(m)
	frozen := make(map[uint64]*cbt.Frozen)
	for _, f := range list {
		frozen[f.Number()] = f
	}
	return frozen, nil
}

// wholeFile says whether the mapped file at path is there and was not cut short: to be
// mapped it is made longer, with zeroes, and marks that are gone would be marks that
// were never made.
func wholeFile(path string) error {
	f, err := openInspected(path)
	if err != nil {
		return err
	}
	if f == nil {
		return os.ErrNotExist
	}
	return errors.Join(f.stepped(), f.Close())
}

// recoverLayers opens the layers and the images that begin with them.
func (d *Device) recoverLayers(frozen map[uint64]*cbt.Frozen) error {
	layers, err := d.openLayers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		d.nextLayer = l.layer.number + 1
		if l.table.spent() {
			if err := d.recoverSpent(l, frozen); err != nil {
				return err
			}
			continue
		}
		if n := len(d.layers); n > 0 {
			d.layers[n-1].newer.Store(l.layer)
		}
		d.layers = append(d.layers, l.layer)
		if s := d.cat.found[l.snapshot]; s != nil {
			l.commit()
			d.recoverImage(s, l, frozen)
		}
	}
	return d.removeOverlays()
}

// removeOverlays removes the overlays of images that are not healthy.
func (d *Device) removeOverlays() error {
	numbers, err := d.numbers(overlayName)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		used := slices.ContainsFunc(d.images, func(i *Image) bool { return i.layer.number == n })
		if used {
			continue
		}
		if err := os.Remove(layerPath(d.dir, overlayName, n)); err != nil {
			return err
		}
	}
	return nil
}

// recoverImage makes the image that begins with l.
func (d *Device) recoverImage(s *Snapshot, l foundLayer, frozen map[uint64]*cbt.Frozen) {
	h, number := l.layerHeader, l.layer.cbt()
	i := &Image{device: d, snapshot: s, size: h.size, layer: l.layer, frozen: frozen[number], gone: make(chan struct{})}
	delete(frozen, number)
	kind, reason := l.fault()
	s.most = h.most
	var err error
	if h.writable && kind == faultNone && i.frozen != nil {
		i.overlay, err = d.openOverlay(l.entered)
	}
	if l.lost != nil {
		d.cfg.Log.Error("snapshot lost", "snapshot", s.name, "err", l.lost)
		d.event(EventSnapshotFailed, s.name, l.lost.Error())
	}
	switch {
	case kind == faultOverflowed:
		i.fault.Store(overflowed)
	case kind != faultNone:
		i.fault.Store(failed(reason))
	case i.frozen == nil:
		i.failFound("its change map is lost")
	case err != nil:
		i.failFound("what was written to it is lost: " + err.Error())
	default:
		l.layer.image = i
		d.addImageLocked(i) // nobody else is there yet
		if l.rollback() != rollbackNone {
			d.rollback.Store(i)
		}
	}
	if i.frozen != nil { // else there is nothing that a user could look at
		l.table.image = i
		s.images = append(s.images, i)
		s.lost--
	}
}

// failFound fails an image that a start has found, and tells it.
func (i *Image) failFound(why string) {
	i.noteFaultLocked(failed(why))
	i.device.cfg.Log.Error("snapshot lost", "snapshot", i.snapshot.name, "err", why)
	i.device.event(EventSnapshotFailed, i.snapshot.name, why)
}
