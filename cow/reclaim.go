// Giving back what no healthy image needs any more.
//
// One goroutine for each device does this, in rounds. Nothing waits for it but,
// for a moment, those who destroy a snapshot. A round
//
//  1. waits until every writer looks at the present shield, so that nobody adds
//     to a layer for an image that has ended;
//  2. cuts off the layers older than the oldest healthy image's: nobody reads
//     through them;
//  3. folds each nameless layer between others into its older neighbour, oldest
//     first, so that the neighbour always has an image (fold.go);
//  4. takes out of a nameless head what older layers have as well: the newest
//     healthy image finds it there, and so do all others; and, as 3 does, what is
//     beyond that image's end; and of any head what was preserved for a rollback that
//     did not come about;
//  5. waits until no reader and no writer can still be looking at what was cut
//     off, and gives it back.
//
// What a layer holds is needed only by an image that finds it in no older layer
// of its chain. After 2 to 4 that holds for every word: check.go proves it.

package cow

import (
	"errors"
	"slices"
	"time"

	"blksnap/store"
)

// settleLimit is how long destroying a snapshot waits for its space to come
// back. Only a hanging disk makes it wait so long.
const settleLimit = 2 * time.Second

// scrap is what was found to be useless.
type scrap struct {
	tables []*table // with all their words
	empty  []*table // without words
	words  []word   // whole slots
	shrunk []word   // single blocks of slots that stay
}

func (s *scrap) none() bool {
	return len(s.tables)+len(s.empty)+len(s.words)+len(s.shrunk) == 0
}

func (s *scrap) add(t scrap) {
	s.tables = append(s.tables, t.tables...)
	s.empty = append(s.empty, t.empty...)
	s.words = append(s.words, t.words...)
	s.shrunk = append(s.shrunk, t.shrunk...)
}

// retireImageLocked takes an image that has ended from its device.
func (d *Device) retireImageLocked(i *Image) {
	d.images = slices.DeleteFunc(d.images, func(j *Image) bool { return j == i })
	i.layer.image = nil
	d.rollback.CompareAndSwap(i, nil) // which cannot be ended any more
	if i.overlay != nil {
		d.retired.tables = append(d.retired.tables, i.overlay.table)
	}
	if i.snapshot.most != 0 {
		d.limits.Add(-1)
		i.snapshot.blocks.Add(-i.blocks)
		i.blocks = 0
	}
	d.reshieldLocked()
	d.askLocked()
}

// retire gives a slot back that a word no longer names, once no reader can be
// using it.
func (d *Device) retire(w word) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.retired.words = append(d.retired.words, w)
	d.askLocked()
}

// reshieldLocked publishes the layers from the newest healthy image's on, or
// nothing where there is none.
func (d *Device) reshieldLocked() {
	for n := len(d.layers) - 1; n >= 0; n-- {
		if d.layers[n].image != nil {
			d.shield.Store(&shield{slices.Clone(d.layers[n:]), d.layers[n].image.size})
			return
		}
	}
	d.shield.Store(nil)
}

// askLocked asks for a round that sees everything up to now.
func (d *Device) askLocked() {
	d.asked++
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// settle waits until everything that was useless at the call was given back, at
// most limit or until the device stops, and says whether it was.
func (d *Device) settle(limit time.Duration) bool {
	deadline := time.Now().Add(limit) // not after the timer's
	late := time.AfterFunc(limit, d.wakeSettlers)
	defer late.Stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	for want := d.asked; d.round < want; {
		if d.closed || !time.Now().Before(deadline) {
			return false
		}
		d.settled.Wait()
	}
	return true
}

func (d *Device) wakeSettlers() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.settled.Broadcast()
}

// reclaim does rounds until the device stops.
func (d *Device) reclaim() {
	defer d.wakeSettlers()
	for {
		select {
		case <-d.stop:
			return
		case <-d.wake:
		}
		d.mu.Lock()
		round := d.asked
		d.mu.Unlock()
		if !d.reclaimRound() {
			return
		}
		d.mu.Lock()
		d.round = round
		d.settled.Broadcast()
		d.mu.Unlock()
	}
}

// reclaimRound does one round; false when the device stops.
func (d *Device) reclaimRound() bool {
	d.mu.Lock()
	s, unwanted := d.retired, d.unwanted
	d.retired, d.unwanted = scrap{}, nil
	useless := slices.IndexFunc(d.layers, func(l *layer) bool { return l.image != nil })
	if useless < 0 {
		useless = len(d.layers)
	}
	d.mu.Unlock()
	if !d.writers.turn(d.stop) {
		d.keep(s)
		return false
	}

	// Layers only join at the end meanwhile, and no image comes to an old one.
	d.mu.Lock()
	for _, l := range d.layers[:useless] {
		s.tables = append(s.tables, l.table)
	}
	d.layers = slices.Delete(d.layers, 0, useless)
	d.mu.Unlock()

	// Where memory faults nothing is left to do: no image needs any layer.
	d.guarded(func() {
		d.foldAll(&s)
		d.dropUnwanted(unwanted, &s)
		d.pruneHead(&s)
	})
	if !d.giveUp(&s) {
		d.keep(s)
		return false
	}
	return true
}

// keep leaves scrap for closeTables.
func (d *Device) keep(s scrap) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.retired.add(s)
}

// giveUp gives scrap back when nobody looks at it any more; false when the device
// stops before.
func (d *Device) giveUp(s *scrap) bool {
	if s.none() {
		return true
	}
	if !d.readers.turn(d.stop) || len(s.empty) > 0 && !d.writers.turn(d.stop) {
		return false
	}
	if err := d.free(s); err != nil {
		d.cfg.Log.Warn("cannot give memory back", "err", err)
	}
	*s = scrap{}
	return true
}

// free gives scrap back.
func (d *Device) free(s *scrap) error {
	var errs []error
	// First, because what is left of such a slot may be among the others.
	for _, w := range s.shrunk {
		d.pool.Shrink(w.slot(), w.mask())
	}
	for _, t := range s.tables {
		if !d.spend(t) {
			errs = append(errs, d.forget(t))
			d.cat.did("forget a table")
		}
		d.guarded(func() {
			for _, w := range t.from(0) {
				d.freeSlot(w)
			}
		})
		errs = append(errs, d.closeUseless(t))
	}
	for _, t := range s.empty {
		if !d.spend(t) {
			errs = append(errs, d.forget(t))
			d.cat.did("forget an empty table")
		}
		errs = append(errs, d.closeUseless(t))
	}
	for _, w := range s.words {
		d.freeSlot(w)
	}
	return errors.Join(errs...)
}

// forget is forget of one of the device's tables. What faults holds nothing any more, for
// a start either.
func (d *Device) forget(t *table) (err error) {
	d.always(func() { err = t.forget() })
	return err
}

// freeSlot gives the slot of a word back, if it has one. A slot that a write
// hangs in is not used again.
func (d *Device) freeSlot(w word) {
	if !w.hasSlot() {
		return
	}
	d.mu.Lock()
	stuck := d.stuck[w.slot()]
	delete(d.stuck, w.slot())
	d.mu.Unlock()
	if stuck {
		d.pool.Quarantine(w.slot())
		return
	}
	d.pool.Free(w.slot(), w.mask())
}

// markStuck notes that a write hangs in a slot that is in use.
func (d *Device) markStuck(s store.Slot) {
	d.pool.Hangs(s)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stuck == nil {
		d.stuck = make(map[store.Slot]bool)
	}
	d.stuck[s] = true
}

// closeTables unmaps all tables when the device closes: the reclaimer has ended,
// writers are shut out, and images are read no more. It waits for the readers that
// are inside, because they are looking at the tables.
func (d *Device) closeTables() error {
	d.readers.turn(nil)
	d.mu.Lock()
	tables := slices.Concat(d.retired.tables, d.retired.empty)
	for _, l := range d.layers {
		tables = append(tables, l.table)
	}
	d.retired, d.layers = scrap{}, nil
	d.mu.Unlock()
	var errs []error
	for _, t := range tables {
		errs = append(errs, t.close())
	}
	return errors.Join(errs...)
}

// pruneHead takes the blocks out of a nameless head that an older layer of the
// shield has as well, or that no older image has.
func (d *Device) pruneHead(s *scrap) {
	sh := d.shield.Load()
	if sh == nil || len(sh.layers) == 1 {
		return
	}
	head := sh.head().table
	older := shield{sh.layers[:len(sh.layers)-1], sh.end}
	for c := range head.from(0) {
		d.locking(c, func() { d.takeFromHead(head, c, older.mask(c), s) })
	}
}

// locking calls f with the chunk's lock held.
func (d *Device) locking(c chunkNo, f func()) {
	d.chunkLocks.lock(c, c)
	defer d.chunkLocks.unlock(c, c) // also where memory faults
	f()
}

// dropUnwanted takes additions out of the head.
func (d *Device) dropUnwanted(added []addition, s *scrap) {
	sh := d.shield.Load()
	if sh == nil {
		return // what is left of the head goes as a whole
	}
	for _, a := range added {
		d.locking(a.chunk, func() {
			d.refundTaken(a.chunk, d.takeFromHead(sh.head().table, a.chunk, a.mask, s))
		})
	}
}

// takeFromHead takes blocks of c out of the head and returns those that were there.
// The caller holds the chunk's lock.
func (d *Device) takeFromHead(head *table, c chunkNo, mask uint16, s *scrap) word {
	w := head.load(c)
	taken := makeWord(w.slot(), w.mask()&mask)
	switch {
	case taken.mask() == 0:
	case taken == w:
		head.store(c, 0)
		d.cat.did("take a word from the head")
		s.words = append(s.words, w)
	case w == zeroWord:
		return 0 // always all 16 blocks; it holds no slot, so nothing is gained
	default:
		head.store(c, makeWord(w.slot(), w.mask()&^taken.mask()))
		d.cat.did("take blocks from a word of the head")
		s.shrunk = append(s.shrunk, taken)
	}
	return taken
}
