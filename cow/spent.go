// What is left of the layer of an image that is lost.
//
// A lost image stays, for as long as its snapshot, and says what has become of it. Its
// layer goes back to the snapstore like any other that nobody reads through, but its file
// stays, too: the layer is spent, and of its file only the header counts, which has the
// fault and the reason. That it is spent is noted before any of its slots is given out
// again. A start takes none of the file's words, has it in no chain, and makes the image
// as it was. The file goes when the snapshot is destroyed.

package cow

import (
	"errors"
	"fmt"
	"os"

	"blksnap/cbt"
)

// spent says whether the table is that of a spent layer. An overlay never is one.
func (t *table) spent() bool { return wordAt(t.header(), layerSpent).Load() == 1 }

// setSpent makes a spent layer of it: from the first store on its words mean nothing.
func (t *table) setSpent() {
	wordAt(t.header(), layerSpent).Store(1)
	if t.register != nil {
		t.register.spend(t.entry)
	}
}

// cut gives back what a spent layer's file holds but its header. Nobody looks at the
// words any more.
func (t *table) cut() error { return t.mem.file.Truncate(memoryStep) }

// spend makes a spent layer of a useless table and returns true, or false where no start
// has to find anything of it: then it is to be forgotten.
func (d *Device) spend(t *table) bool {
	if t.image == nil || t.path == "" {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t.image.fault.Load() == destroyed {
		return false
	}
	if !d.guardedLocked(t.setSpent) {
		return false
	}
	t.image.spent = true
	d.cat.did("spend a layer")
	return true
}

// closeUseless closes a table that was spent or forgotten.
func (d *Device) closeUseless(t *table) (err error) {
	spent := false
	d.guarded(func() { spent = t.path != "" && t.spent() })
	if spent {
		err = t.cut()
		d.cat.did("cut a spent layer")
	}
	return errors.Join(err, t.close())
}

// bury makes an image that was lost a destroyed one. Where its device is closed a start
// removes what is left of its layer: the snapshot has no record then.
func (i *Image) bury() {
	d := i.device
	d.mu.Lock()
	defer d.mu.Unlock()
	i.fault.Store(destroyed)
	if !i.spent || d.closed {
		return
	}
	// In this order: a file that is not entered is nobody's.
	if t := i.layer.table; t.register != nil { // which may be one that was lost
		d.guardedLocked(func() { t.register.remove(t.entry) })
	}
	d.cat.did("take a spent layer from the register")
	if err := os.Remove(i.layer.table.path); err != nil {
		d.cfg.Log.Warn("cannot remove what is left of a lost snapshot", "snapshot", i.snapshot.name, "err", err)
	}
	d.cat.did("remove a spent layer")
}

// openSpent ends opening a spent layer, or one that was entered as such. Where it is not to be had,
// that costs no other image anything: none reads through it.
func (d *Device) openSpent(l *layer, e entered, why error) (*layer, error) {
	if why != nil {
		why = fmt.Errorf("layer %d is lost: %w", e.number, why)
		d.cfg.Log.Error("what is left of a lost snapshot is lost", "layer", e.number, "err", why)
		return d.replaceLayer(e, why)
	}
	l.lose(errors.New("nobody knows why")) // it was damaged
	l.table.setSpent()
	return l, nil
}

// recoverSpent makes the image that a spent layer is left of, or removes the layer where
// nothing is left to show.
func (d *Device) recoverSpent(l foundLayer, frozen map[uint64]*cbt.Frozen) error {
	s := d.cat.found[l.snapshot]
	if s == nil || frozen[l.layer.cbt()] == nil {
		return errors.Join(l.table.forget(), l.table.close())
	}
	d.recoverImage(s, l, frozen)
	l.table.image.spent = true
	return errors.Join(l.table.cut(), l.table.close()) // whoever spent it may not have cut it
}
