// Folding a nameless layer into its older neighbour.
//
// A destroyed snapshot's layer is still part of the chains of older images. So
// that chains stay short, its words move to the layer before it. Neither layer is
// the head, so nobody else changes a word of either, and no lock is needed:
// readers and writers look at the layers from new to old (locate, shield.mask),
// and a word is published in the older layer before it goes from the newer one.

package cow

import (
	"errors"
	"slices"
	"time"

	"blksnap/store"
)

// foldAll folds every nameless layer but the head, the oldest first. The layers
// that it has emptied become scrap.
func (d *Device) foldAll(s *scrap) {
	var kept *layer // could not be folded: the store has no room, or fails
	for {
		older, end, l := d.nextFold(kept)
		if l == nil {
			return
		}
		if !d.fold(older, end, l, s) {
			kept = l
			continue
		}
		d.unlink(older, l)
		s.empty = append(s.empty, l.table)
	}
}

// nextFold finds the oldest nameless layer after the layer kept, which is neither
// the head nor the oldest, and its older neighbour, whose image ends at end.
func (d *Device) nextFold(kept *layer) (older *layer, end int64, l *layer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	from := 1 + slices.Index(d.layers, kept)
	for n := max(from, 1); n < len(d.layers)-1; n++ {
		if i := d.layers[n-1].image; i != nil && d.layers[n].image == nil {
			return d.layers[n-1], i.size, d.layers[n]
		}
	}
	return nil, 0, nil
}

// fold moves the words of l to older, as far as they are before end, and says
// whether all of them went. It ends early where the device stops, and where the
// snapstore hangs: one deadline is enough to learn that.
func (d *Device) fold(older *layer, end int64, l *layer, s *scrap) bool {
	all := true
	for c, w := range l.table.from(0) {
		if d.stopped() {
			return false
		}
		err := d.foldChunk(older.table, end, c, w, s)
		if errors.Is(err, store.ErrFull) && d.giveUp(s) {
			err = d.foldChunk(older.table, end, c, w, s) // now with what was useless before
		}
		if errors.Is(err, errStuck) {
			return false
		}
		if err != nil {
			all = false
			continue
		}
		d.cat.did("fold a word into the older layer")
		l.table.store(c, 0)
		d.cat.did("take a word from the newer layer")
	}
	return all
}

// foldChunk sees to it that older has the blocks of w that are before end. Then w
// needs no place in the newer layer any more. What is useless becomes scrap only when older
// has the rest: where that faults, the newer layer goes on naming all of it.
func (d *Device) foldChunk(older *table, end int64, c chunkNo, w word, s *scrap) error {
	useless := w.mask() & c.beyond(end)
	if useless == w.mask() {
		s.words = append(s.words, w)
		return nil
	}
	if err := older.reserve(c, 1); err != nil {
		return err
	}
	o := older.load(c)
	need := w.mask() &^ useless &^ o.mask()
	if o == 0 {
		// The slot moves with it.
		if !w.hasSlot() || useless == 0 {
			older.store(c, w)
			return nil
		}
		older.store(c, makeWord(w.slot(), need))
		s.shrunk = append(s.shrunk, makeWord(w.slot(), useless))
		return nil
	}
	if need != 0 {
		var charged []charge
		if !w.hasSlot() {
			charged = d.chargeFolded(older, c, need)
		}
		joined, err := d.join(o, w, need)
		if err != nil {
			d.refund(charged)
			return err
		}
		older.store(c, joined)
		if joined.slot() != o.slot() {
			s.words = append(s.words, o)
		}
	}
	s.words = append(s.words, w)
	return nil
}

// join copies the blocks need of w to the slot of o and returns the word for both.
// Where the slot's part has no room it copies both to another slot. It may use
// the reserve: what it takes, it soon gives back.
func (d *Device) join(o, w word, need uint16) (word, error) {
	err := d.pool.ExtendReserve(o.slot(), need)
	if err == nil {
		if err := d.copyBlocks(o.slot(), w, need); err != nil {
			d.unextend(o.slot(), need, err)
			return 0, err
		}
		return o.with(need), nil
	}
	slot, mask := []store.Slot{0}, []uint16{o.mask() | need}
	if _, err := d.pool.AllocReserve(slot, mask); err != nil {
		return 0, err
	}
	err = d.copyBlocks(slot[0], o, o.mask())
	if err == nil {
		err = d.copyBlocks(slot[0], w, need)
	}
	if err != nil {
		d.unalloc(slot[0], mask[0], err)
		return 0, err
	}
	return makeWord(slot[0], mask[0]), nil
}

// copyBlocks copies the blocks mask of w's chunk to slot to. The blocks of
// zeroWord are written out: a slot holds old bytes.
func (d *Device) copyBlocks(to store.Slot, w word, mask uint16) (err error) {
	b := batches.Get().(*batch)
	defer func() {
		b.spare(err)
		batches.Put(b)
	}()
	deadline := time.Now().Add(d.cfg.PreserveLimit)
	for first, n := range runs(mask) {
		p, at := b.buffer(int64(n)<<blockShift), int64(first)<<blockShift
		if w.hasSlot() {
			err = d.copier.read(w.slot(), p, at, deadline)
		} else {
			clear(p)
		}
		if err == nil {
			err = d.copier.write(to, p, at, deadline)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unlink takes l, which has no words left, out of the chain. Readers that are at
// it go on to the next layer.
func (d *Device) unlink(older, l *layer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	older.newer.Store(l.newer.Load())
	d.layers = slices.DeleteFunc(d.layers, func(x *layer) bool { return x == l })
	d.reshieldLocked()
}
