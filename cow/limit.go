// What one snapshot may take of the snapstore.
//
// A snapshot with a limit counts the blocks that its images find in slots: those
// that were preserved since its instant, no matter who needs them as well, and those
// that were written to its images. A block that would be one too many breaks the
// image that it is for, as if the snapstore had no room for it (overflow.go), and
// nothing else. What a broken image had counted goes.
//
// Blocks are counted before they are published, and who is to count them is asked in
// the tables: of the images without the block in their chains. The caller holds
// the chunk's lock, so that nobody else preserves the block meanwhile; and that a fold
// moves words does not change which blocks a chain has.

package cow

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"blksnap/store"
)

// charge counts n more blocks, unless they are too many.
func (s *Snapshot) charge(n int64) bool {
	for {
		was := s.blocks.Load()
		if was+n > s.most {
			return false
		}
		if s.blocks.CompareAndSwap(was, was+n) {
			return true
		}
	}
}

// chargeLocked counts n more blocks of an image, fewer where n is negative. It returns
// false, and has counted nothing, where they are too many. Nothing is counted for an
// image that has ended.
func (i *Image) chargeLocked(n int64) bool {
	if i.snapshot.most == 0 || i.fault.Load() != nil {
		return true
	}
	if !i.snapshot.charge(n) {
		return false
	}
	i.blocks += n
	return true
}

// charge is chargeLocked for those who add to what was written to the image.
func (i *Image) charge(n int64) error {
	if i.snapshot.most == 0 {
		return nil
	}
	i.device.mu.Lock()
	defer i.device.mu.Unlock()
	if !i.chargeLocked(n) {
		return &overLimit{[]*Image{i}}
	}
	return nil
}

// overLimit says which images would need more than their snapshots may.
type overLimit struct{ images []*Image }

func (e *overLimit) Error() string {
	var names []string
	for _, i := range e.images {
		names = append(names, fmt.Sprintf("%s is limited to %d bytes", i.snapshot.name, i.snapshot.MaxStore()))
	}
	return strings.Join(names, ", ")
}

func (e *overLimit) Unwrap() error { return store.ErrFull }

// breakOver breaks them.
func (d *Device) breakOver(e *overLimit) {
	for _, i := range e.images {
		d.breakImage(i, overflowed, &overLimit{[]*Image{i}})
	}
}

// charge is what an image was made to count.
type charge struct {
	*Image
	n int64
}

// chargeMissing has images count what is missing of some chunks, or fails with
// overLimit, or where memory faults: the caller has slots to give back then. The caller is
// inside the gate and holds the chunks' locks.
func (d *Device) chargeMissing(list []missing) (charged []charge, err error) {
	if d.limits.Load() == 0 {
		return nil, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err = errFaulted
	d.guardedLocked(func() {
		charged, err = d.chargeAllLocked(func(i *Image) (n int64) {
			for _, m := range list {
				n += int64(bits.OnesCount16(d.lacksLocked(i, nil, m.chunk, m.mask)))
			}
			return n
		})
	})
	return charged, err
}

// chargeFolded has images count the blocks mask of chunk c, zeroes that took no slot
// so far and do in older. An image with too many breaks.
func (d *Device) chargeFolded(older *table, c chunkNo, mask uint16) []charge {
	if d.limits.Load() == 0 {
		return nil
	}
	for {
		list, err := func() ([]charge, error) {
			d.mu.Lock()
			defer d.mu.Unlock() // also where memory faults
			return d.chargeAllLocked(func(i *Image) int64 {
				return int64(bits.OnesCount16(d.lacksLocked(i, older, c, mask)))
			})
		}()
		if err == nil {
			return list
		}
		d.breakOver(err.(*overLimit))
	}
}

// chargeAllLocked has each image with a limit count what n says, or all count nothing.
func (d *Device) chargeAllLocked(n func(i *Image) int64) ([]charge, error) {
	var list []charge
	var over []*Image
	for _, i := range d.images {
		if i.snapshot.most == 0 {
			continue
		}
		switch n := n(i); {
		case n == 0:
		case i.chargeLocked(n):
			list = append(list, charge{i, n})
		default:
			over = append(over, i)
		}
	}
	if over != nil {
		refundLocked(list)
		return nil, &overLimit{over}
	}
	return list, nil
}

// refund undoes what was counted.
func (d *Device) refund(list []charge) {
	if list != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		refundLocked(list)
	}
}

func refundLocked(list []charge) {
	for _, c := range list {
		c.chargeLocked(-c.n)
	}
}

// lacksLocked is which blocks of c the image finds in none of its layers. With a table
// given it is those that it finds in none before that; all, where the table is in none
// of its layers.
func (d *Device) lacksLocked(i *Image, before *table, c chunkNo, mask uint16) uint16 {
	mask &^= c.beyond(i.size)
	first := slices.Index(d.layers, i.layer)
	last := len(d.layers)
	if before != nil {
		last = slices.IndexFunc(d.layers, func(l *layer) bool { return l.table == before })
	}
	if last < first {
		return 0 // of an image that is newer
	}
	for _, l := range slices.Backward(d.layers[first:last]) {
		mask &^= l.table.load(c).mask()
	}
	return mask
}

// refundTaken has images count less, from whose chains the blocks of words w of
// chunk c were taken.
func (d *Device) refundTaken(c chunkNo, w word) {
	if d.limits.Load() == 0 || !w.hasSlot() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, i := range d.images {
		i.chargeLocked(-int64(bits.OnesCount16(d.lacksLocked(i, nil, c, w.mask()))))
	}
}

// slotBlocks is how many blocks the image finds in slots. The caller is inside readers, and
// nobody preserves anything.
func (i *Image) slotBlocks() (n int64) {
	chain := i.chain(nil, nil)
	for c := range preserved(chain, 0, chunks(i.size)) {
		var places [blocksPerChunk]place
		locate(chain, places[:], c.off(), min(chunkSize, i.size-c.off()))
		for _, p := range places {
			if p > isZero {
				n++
			}
		}
	}
	if i.overlay != nil {
		n += i.overlay.bytes() / blockSize
	}
	return n
}

// recount counts anew what a predecessor left of the device's images.
func (d *Device) recount() {
	g, _ := d.readers.tryEnter()
	defer d.readers.leave(g)
	for _, i := range d.images {
		if i.snapshot.most != 0 {
			i.blocks = i.slotBlocks()
			i.snapshot.blocks.Add(i.blocks)
		}
	}
}

// MaxStore is TakeOptions.MaxStore, 0 where there is no limit.
func (s *Snapshot) MaxStore() int64 { return s.most * blockSize }
