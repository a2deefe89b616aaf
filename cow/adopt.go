// Putting the slots in use again that a predecessor's words name, when a start can no
// longer fail.

package cow

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"blksnap/store"
)

// resume puts the slots that a predecessor's words name in use again, ends the images
// that need what the origin does not have any more, and begins to preserve and to
// reclaim. It is called once, before anything is written.
func (d *Device) resume() {
	// Where memory faults it begins again, and takes the words of slots that it has put in
	// use by then from the tables: no image is there any more that they are for.
	d.always(d.adopt)
	d.always(func() { d.loseCut(d.Size(), math.MaxInt64) })
	d.guarded(d.recount) // else there is nothing to count
	d.mu.Lock()
	d.reshieldLocked()
	d.askLocked()
	d.mu.Unlock()
	d.tellTear() // now it is certain whether the rollback can go on
	d.running.Go(d.reclaim)
}

// adopt puts the slots that words name in use again. A slot that two layers name
// for a chunk was being moved from the newer to the older. One that is not to be
// had, because its part died with the process or is another now, costs the images
// that read it.
func (d *Device) adopt() {
	for _, t := range d.retired.tables { // of images that were lost before
		d.adoptOverlay(t)
	}
	for _, i := range slices.Clone(d.images) {
		if i.overlay == nil {
			continue
		}
		if lost := d.adoptOverlay(i.overlay.table); lost != nil {
			lost = fmt.Errorf("some of what was written to it is lost: %w", lost)
			d.breakImage(i, failed(lost.Error()), lost)
		}
	}
	for n, l := range d.layers {
		for c, w := range l.table.from(0) {
			if !w.hasSlot() {
				continue
			}
			err := d.pool.Adopt(w.slot(), w.mask())
			if err == nil {
				continue
			}
			l.table.store(c, 0)
			if !errors.Is(err, store.ErrAdopted) || !d.older(n, c, w) {
				d.loseFound(n, c, w.mask(), err)
			}
		}
	}
}

// older says whether a layer before n has the blocks of w, a word of c, in the same
// slot.
func (d *Device) older(n int, c chunkNo, w word) bool {
	return slices.ContainsFunc(d.layers[:n], func(l *layer) bool {
		o := l.table.load(c)
		return o.hasSlot() && o.slot() == w.slot() && w.mask()&^o.mask() == 0
	})
}

// adoptOverlay does the same with an overlay's table, whose slots nobody else names.
// The error says why some are not to be had.
func (d *Device) adoptOverlay(t *table) (lost error) {
	for c, w := range t.from(0) {
		if !w.hasSlot() {
			continue
		}
		if err := d.pool.Adopt(w.slot(), w.mask()); err != nil {
			t.store(c, 0)
			lost = err
		}
	}
	return lost
}

// loseFound breaks the images that find blocks mask of c in layer n, where they
// are no more.
func (d *Device) loseFound(n int, c chunkNo, mask uint16, err error) {
	err = fmt.Errorf("blocks that it needs are lost: %w", err)
	var older uint16
	for k := n; k >= 0 && mask&^older != 0; k-- {
		if k < n {
			older |= d.layers[k].table.load(c).mask()
		}
		if i := d.layers[k].image; i != nil && mask&^older&^c.beyond(i.size) != 0 {
			d.breakImage(i, failed(err.Error()), err)
		}
	}
}
