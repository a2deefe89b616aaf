// Proving that the books are right.

package cow

import (
	"errors"
	"fmt"

	"blksnap/store"
)

// Check compares what the pool says is in use with what the tables of the
// devices, all that use the pool, name: the slots in use are exactly those that
// words name, with exactly their blocks. And no word is there that no healthy
// image reads through. It is for tests and for doubts, expects that nothing is
// written meanwhile, and waits until what was destroyed is given back.
func Check(pool *store.Pool, devices ...*Device) error {
	var errs []error
	named := make(map[store.Slot]uint16)
	for _, d := range devices {
		if !d.settle(settleLimit) {
			errs = append(errs, fmt.Errorf("%s: what was destroyed is not given back after %v", d.name, settleLimit))
		}
		d.mu.Lock()
		errs = append(errs, d.checkLocked(named))
		d.mu.Unlock()
	}
	for s, mask := range pool.InUse() {
		if named[s] != mask {
			errs = append(errs, fmt.Errorf("slot %v is in use with blocks %016b, words name %016b", s, mask, named[s]))
		}
		delete(named, s)
	}
	for s, mask := range named {
		errs = append(errs, fmt.Errorf("words name blocks %016b of slot %v, which is not in use", mask, s))
	}
	return errors.Join(append(errs, pool.Check())...)
}

// checkLocked adds the slots that the device's words name to named.
func (d *Device) checkLocked(named map[store.Slot]uint16) error {
	var errs []error
	newest := -1 // index of the newest layer so far that has an image
	for n, l := range d.layers {
		if l.image != nil {
			newest = n
		}
		if newest < 0 {
			errs = append(errs, fmt.Errorf("%s: layer %d is older than every image", d.name, n))
		}
		if next := l.newer.Load(); n+1 < len(d.layers) && next != d.layers[n+1] || n+1 == len(d.layers) && next != nil {
			errs = append(errs, fmt.Errorf("%s: layer %d is not linked to the next", d.name, n))
		}
		errs = append(errs, d.checkTable(l.table, fmt.Sprintf("layer %d", n), named))
		for c, w := range l.table.from(0) {
			if useless := d.uselessLocked(newest, n, c, w); useless != 0 {
				errs = append(errs, fmt.Errorf("%s: nobody reads blocks %016b of chunk %d in layer %d", d.name, useless, c, n))
			}
		}
	}
	for _, i := range d.images {
		if i.overlay != nil {
			errs = append(errs, d.checkTable(i.overlay.table, "overlay of "+i.snapshot.name, named))
		}
		if n := i.slotBlocks(); i.snapshot.most != 0 && i.blocks != n {
			errs = append(errs, fmt.Errorf("%s: image %s counts %d blocks, it has %d", d.name, i.snapshot.name, i.blocks, n))
		}
	}
	return errors.Join(errs...)
}

// checkTable adds the slots that the table's words name to named.
func (d *Device) checkTable(t *table, what string, named map[store.Slot]uint16) error {
	var errs []error
	for c, w := range t.from(0) {
		if w.hasSlot() {
			if named[w.slot()] != 0 {
				errs = append(errs, fmt.Errorf("%s: slot %v is named twice", d.name, w.slot()))
			}
			named[w.slot()] |= w.mask()
		}
		if w.mask() == 0 {
			errs = append(errs, fmt.Errorf("%s: %s has an empty word for chunk %d", d.name, what, c))
		}
	}
	return errors.Join(errs...)
}

// uselessLocked is which blocks of w, the word of c in layer n, are in an older
// layer of the newest image's chain too, or beyond its end, so that no image reads
// them here.
func (d *Device) uselessLocked(newest, n int, c chunkNo, w word) uint16 {
	var older uint16
	if newest >= 0 {
		older = c.beyond(d.layers[newest].image.size)
	}
	for _, l := range d.layers[max(newest, 0):n] {
		older |= l.table.load(c).mask()
	}
	useless := w.mask() & older
	if !w.hasSlot() && useless != w.mask() {
		return 0 // zeroWord is for all blocks or none
	}
	return useless
}
