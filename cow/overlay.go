// What was written to an image.
//
// An overlay is a table like a layer's, and slots that belong to one image alone.
// It comes before the layers when the image is read, and no other image ever looks
// at it. A word of an overlay is never taken away while the image lives: it gains
// blocks, moves to another slot, or becomes zeroWord, whose slot goes back.
//
// A writer holds the locks of its chunks, so words change one after the other.
// Readers hold none, as everywhere:
//
//   - Blocks that the overlay does not have yet are written whole, the bytes around
//     a smaller write read from the image first, and then published.
//   - Blocks that it has are overwritten in place. A reader may find old bytes or
//     new ones, as it may in the origin.
//   - A slot that a word no longer names is given back when no reader can be at it.
//
// A writer may wait for the origin, the snapstore, or another writer of the chunk.
// It is inside Device.readers, and holds nothing that a write of the device waits
// for.

package cow

import (
	"errors"
	"fmt"
	"math/bits"

	"blksnap/store"
)

type overlay struct {
	table *table

	// locks serialize the writers of a chunk. Held across I/O.
	locks chunkLocks
}

// newOverlay makes an empty overlay for a device whose state is in dir.
func newOverlay(dir string, h layerHeader) (*overlay, error) {
	t, err := openTable(layerPath(dir, overlayName, h.number), chunks(h.size))
	if err != nil {
		return nil, err
	}
	h.encode(t.header(), overlayMagic)
	return &overlay{table: t}, nil
}

// openOverlay opens the overlay that a predecessor left, as it was entered.
func (d *Device) openOverlay(e entered) (*overlay, error) {
	t, err := findTable(layerPath(d.dir, overlayName, e.number), overlayMagic, e.number)
	if errors.Is(err, errBlank) {
		err = errors.New("its file was emptied")
	}
	if err != nil {
		return nil, cause(err)
	}
	h, _ := decodeLayerHeader(t.header(), overlayMagic)
	if err := e.check(h); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return &overlay{table: t}, nil
}

// bytes is how much of the snapstore the overlay takes. The caller is inside
// readers.
func (o *overlay) bytes() int64 {
	var blocks int64
	for _, w := range o.table.from(0) {
		blocks += w.blocks()
	}
	return blocks * blockSize
}

// change is what a write does to one chunk: span is in whole blocks, word what the
// overlay has of the chunk, slot where the blocks go.
type change struct {
	span
	word word
	slot store.Slot
}

// moves says whether the blocks go to another slot than those that are there.
func (c change) moves() bool { return c.slot != c.word.slot() }

// carried is which blocks must be copied along to the other slot.
func (c change) carried() uint16 { return c.word.mask() &^ c.mask() }

// added is which blocks the chunk's own slot gains.
func (c change) added() uint16 { return c.mask() &^ c.word.mask() }

func (c change) result() word { return makeWord(c.slot, c.word.mask()|c.mask()) }

// grows is how many more blocks the chunk has in slots afterwards.
func (c change) grows() int64 {
	return int64(bits.OnesCount16(c.word.mask()|c.mask())) - c.word.blocks()
}

// writeWindow writes p, at most a window long, to the overlay. The caller is inside
// readers. It fails with store.ErrFull where there is no room, and with the
// snapstore's error where no part takes it; then each block is as it was, or as if
// it had been written.
func (i *Image) writeWindow(p []byte, off int64) error {
	o := i.overlay
	first, last := chunkNo(off>>chunkShift), chunkNo((off+int64(len(p))-1)>>chunkShift)
	o.locks.lock(first, last)
	defer o.locks.unlock(first, last)
	if err := o.table.reserve(first, int(last-first)+1); err != nil {
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	}
	if err := i.mark(off, int64(len(p))); err != nil {
		return err
	}
	b := batches.Get().(*batch)
	defer batches.Put(b)
	p, off, err := i.wholeBlocks(b.buffer(window*chunkSize), p, off)
	if err != nil {
		return err
	}
	var room [window]change
	changes := room[:0]
	var grows int64
	for sp := range spans(off, int64(len(p))) {
		c := change{span: sp, word: o.table.load(sp.chunk)}
		changes, grows = append(changes, c), grows+c.grows()
	}
	if err := i.charge(grows); err != nil {
		return err
	}
	if err := i.writeSlots(changes, p); err != nil {
		i.charge(-grows)
		return err
	}
	for _, c := range changes {
		o.table.store(c.chunk, c.result())
		i.device.cat.did("publish a word of an overlay")
		if c.word.hasSlot() && c.moves() {
			i.device.retire(c.word)
		}
	}
	return nil
}

// writeSlots finds slots for the changes and writes them there.
func (i *Image) writeSlots(changes []change, p []byte) error {
	for failed := 0; ; failed++ {
		// A part that has failed once is left: it may still be read.
		if err := i.takeSlots(changes, failed > 0); err != nil {
			return err
		}
		err := i.fillSlots(changes, p)
		if err == nil {
			return nil
		}
		i.giveSlotsBack(changes, err)
		if failed == maxAttempts {
			return err
		}
	}
}

// wholeBlocks returns p, or, where it does not begin and end with a block, the
// blocks that it touches as they are to become, in buf. Beyond the image's end
// they are zeroes. The caller holds the chunks' locks.
func (i *Image) wholeBlocks(buf, p []byte, off int64) ([]byte, int64, error) {
	end := off + int64(len(p))
	from, to := off&^(blockSize-1), roundUp(end, blockSize)
	if from == off && to == end {
		return p, off, nil
	}
	buf = buf[:to-from]
	copy(buf[off-from:], p)
	rest := min(to, i.size)
	clear(buf[rest-from:])
	for _, around := range [][2]int64{{from, off}, {end, rest}} {
		if around[0] == around[1] {
			continue
		}
		if err := i.readThrough(i.overlay, buf[around[0]-from:around[1]-from], around[0]); err != nil {
			return nil, 0, err
		}
	}
	return buf, from, nil
}

// takeSlots finds a slot for each change: the chunk's own, if it has one with room
// and move is not set, or a new one. If it fails no slot was taken.
func (i *Image) takeSlots(changes []change, move bool) error {
	pool := i.device.pool
	for k := 0; k < len(changes); {
		c := &changes[k]
		if !move && c.word.hasSlot() && (c.added() == 0 || pool.Extend(c.word.slot(), c.added()) == nil) {
			c.slot = c.word.slot()
			k++
			continue
		}
		var slots [window]store.Slot
		var masks [window]uint16
		n := 0
		for n == 0 || k+n < len(changes) && (move || !changes[k+n].word.hasSlot()) {
			masks[n] = changes[k+n].word.mask() | changes[k+n].mask()
			n++
		}
		n, err := pool.Alloc(slots[:n], masks[:n])
		if err != nil {
			i.giveSlotsBack(changes[:k], nil)
			return err
		}
		for j := range n {
			changes[k+j].slot = slots[j]
		}
		k += n
	}
	return nil
}

// giveSlotsBack undoes takeSlots after an attempt to fill them ended with err.
func (i *Image) giveSlotsBack(changes []change, err error) {
	for _, c := range changes {
		if c.moves() {
			i.device.unalloc(c.slot, c.result().mask(), err)
		} else if c.added() != 0 {
			i.device.unextend(c.slot, c.added(), err)
		}
	}
}

// fillSlots writes p, and what else the chunks have in other slots, to the slots.
func (i *Image) fillSlots(changes []change, p []byte) error {
	for _, c := range changes {
		if c.moves() && c.carried() != 0 {
			if err := i.device.copyBlocks(c.slot, c.word, c.carried()); err != nil {
				return err
			}
		}
	}
	// One write for each run of neighbouring slots.
	for len(changes) > 0 {
		k, n := 0, int64(0)
		for k < len(changes) && changes[k].slot == changes[0].slot+store.Slot(k) {
			n += changes[k].n
			k++
		}
		if err := i.device.pool.WriteAt(changes[0].slot, p[:n], changes[0].skip); err != nil {
			return err
		}
		p, changes = p[n:], changes[k:]
	}
	return nil
}

// zeroChunk makes a whole chunk read as zeroes, for which it needs no slot.
func (i *Image) zeroChunk(c chunkNo) error {
	o := i.overlay
	o.locks.lock(c, c)
	defer o.locks.unlock(c, c)
	w := o.table.load(c)
	if w == zeroWord {
		return nil
	}
	if err := o.table.reserve(c, 1); err != nil {
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	}
	if err := i.mark(c.off(), chunkSize); err != nil {
		return err
	}
	o.table.store(c, zeroWord)
	i.device.cat.did("zero a chunk of an overlay")
	if w.hasSlot() {
		i.charge(-w.blocks())
		i.device.retire(w)
	}
	return nil
}
