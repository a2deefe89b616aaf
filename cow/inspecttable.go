// Verifying what a device keeps in the run directory: its change map, its layers and
// overlays, and who its origin was.

package cow

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"blksnap/cbt"
)

// runDevice verifies what a device keeps in the run directory. Where its register, which
// comes last, was not begun, the device was being added: the next start begins with it
// anew.
func (w *inspector) runDevice(name, dir string) {
	// The lease is the last file that a device gets, and then come layers.
	if isBlank(filepath.Join(dir, registerName)) || isBlank(filepath.Join(dir, "lease")) {
		if numbers, err := numbersIn(dir, layerName); err == nil && len(numbers) == 0 {
			return
		}
	}
	w.runLease(filepath.Join(dir, "lease"))
	if layers, err := numbersIn(dir, layerName); err == nil && len(layers) > 0 {
		for _, name := range []string{"lease", "changes"} {
			path := filepath.Join(dir, name)
			if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
				w.tell(path, adviceDevice, "it is not there, and layers are")
			}
		}
	}
	path := filepath.Join(dir, "changes")
	changes, err := inspectChanges(path)
	if err != nil {
		w.tell(path, adviceDevice, "%v", err)
	}
	w.register(dir)
	for _, kind := range []struct{ name, magic string }{{layerName, layerMagic}, {overlayName, overlayMagic}} {
		numbers, err := numbersIn(dir, kind.name)
		if err != nil {
			w.tell(dir, "see to it that it can be read", "%v", cause(err))
		}
		for _, n := range numbers {
			w.table(name, layerPath(dir, kind.name, n), kind.magic, n, changes)
		}
	}
}

// isBlank says whether there is no file at path, or nothing in it.
func isBlank(path string) bool {
	f, err := openInspected(path)
	if f == nil {
		return err == nil
	}
	defer f.Close()
	return f.blank()
}

// register verifies the register of layers in dir, and that what it has is there.
func (w *inspector) register(dir string) {
	path := filepath.Join(dir, registerName)
	f := w.open(path, adviceSnapshots)
	if f == nil {
		if numbers, err := numbersIn(dir, layerName); err == nil && len(numbers) > 0 {
			w.tell(path, adviceSnapshots, "it is not there: nobody knows whether all layers are")
		}
		return
	}
	defer f.Close()
	b, err := f.head(entryBytes)
	if err == nil {
		err = checkMagic(b, registerMagic, registerVersion, registerHeader)
	}
	if err == nil {
		err = f.stepped()
	}
	for at := int64(entryBytes); err == nil && at+entryBytes <= f.size; at += entryBytes {
		if _, err = f.ReadAt(b, at); err != nil {
			break
		}
		e, used, derr := decodeEntry(b)
		if derr != nil {
			err = derr
		} else if used {
			w.entered(dir, e)
		}
	}
	if err != nil {
		w.tell(path, adviceSnapshots, "%v", cause(err))
	}
}

// entered verifies that a layer in dir is the one that was entered.
func (w *inspector) entered(dir string, e entered) {
	path := layerPath(dir, layerName, e.number)
	f, err := openInspected(path)
	if err == nil && f == nil {
		w.tell(path, adviceSnapshots, "it is not there")
	}
	if f == nil {
		return // or it was told of
	}
	defer f.Close()
	if f.blank() {
		w.tell(path, adviceSnapshots, "its file was emptied")
		return
	}
	b, err := f.head(tableHeader)
	if err != nil {
		return // table tells of it
	}
	h, err := decodeLayerHeader(b, layerMagic)
	switch {
	case err != nil: // likewise
	case e.check(h) != nil:
		w.tell(path, adviceSnapshots, "%v", e.check(h))
	case h.writable && host.Uint64(b[layerFault:]) == faultNone:
		w.overlay(layerPath(dir, overlayName, e.number))
	}
}

// overlay verifies that there is an overlay, of a healthy image, and not an empty file.
func (w *inspector) overlay(path string) {
	f, err := openInspected(path)
	if err == nil && f == nil {
		w.tell(path, adviceSnapshots, "it is not there")
	}
	if f == nil {
		return
	}
	defer f.Close()
	if f.blank() {
		w.tell(path, adviceSnapshots, "its file was emptied")
	}
}

// runLease verifies the lease file.
func (w *inspector) runLease(path string) {
	f := w.open(path, adviceDevice)
	if f == nil {
		return
	}
	defer f.Close()
	b, err := f.head(memoryStep)
	if err == nil {
		_, err = decodeCheckpoint(b[:checkpointHeader])
	}
	if err != nil {
		w.tell(path, adviceDevice, "who the origin was: %v", err)
		return
	}
	w.lease(path, int64(host.Uint64(b[leaseAt:])), runLease)
}

// inspectChanges verifies a change map; nil where there is none.
func inspectChanges(path string) (*cbt.Report, error) {
	f, err := openInspected(path)
	if f == nil {
		return nil, err
	}
	defer f.Close()
	if err := f.stepped(); err != nil {
		return nil, err
	}
	r, err := cbt.Inspect(f, f.size)
	if err == nil && r.Lost {
		err = errors.New("there was no memory for a mark")
	}
	return r, cause(err)
}

// table verifies a layer or an overlay.
func (w *inspector) table(device, path, magic string, number uint64, changes *cbt.Report) {
	f := w.open(path, adviceSnapshots)
	if f == nil {
		return // it was there a moment ago
	}
	defer f.Close()
	if f.blank() {
		return // it had just come, or was about to go, or entered tells of it
	}
	b, err := f.head(tableHeader)
	var h layerHeader
	if err == nil {
		h, err = decodeLayerHeader(b, magic)
	}
	switch {
	case err != nil:
	case h.number != number || h.size <= 0:
		err = fmt.Errorf("%w: it is layer %d of %d bytes", ErrDamaged, h.number, h.size)
	default:
		err = f.stepped()
	}
	if err == nil && magic == layerMagic {
		err = w.layer(b, h, changes)
	}
	if err == nil && host.Uint64(b[layerSpent:]) == 0 {
		w.tables = append(w.tables, inspectedTable{path, device, number, magic == overlayMagic})
		err = w.words(f, chunks(h.size))
	}
	if err != nil {
		w.tell(path, adviceSnapshots, "%v", err)
	}
}

// layer verifies what changes in a layer's header.
func (w *inspector) layer(b []byte, h layerHeader, changes *cbt.Report) error {
	fault, cbt := host.Uint64(b[layerFault:]), host.Uint64(b[layerCBT:])
	committed, rollback := host.Uint64(b[layerCommitted:]), host.Uint64(b[layerRollback:])
	spent := host.Uint64(b[layerSpent:])
	switch {
	case fault > faultDestroyed || committed > 1 || rollback > rollbackTorn || spent > 1 || spent == 1 && fault == faultNone:
		return fmt.Errorf("%w: words of its header: committed %d, fault %d, rollback %d, spent %d", ErrDamaged, committed, fault, rollback, spent)
	case host.Uint64(b[layerReason:]) > layerReasonBytes:
		return fmt.Errorf("%w: a reason of %d bytes", ErrDamaged, host.Uint64(b[layerReason:]))
	}
	if name, live := w.snapshots[h.snapshot]; live && fault == faultNone && changes != nil && !changes.Frozen[cbt] {
		return fmt.Errorf("the change map %d of snapshot %s is lost", cbt, name)
	}
	return nil
}

// words verifies a table of chunks [0, end) and collects the slots that it names.
func (w *inspector) words(f *inspectedFile, end chunkNo) error {
	levels, _ := tableShape(end)
	t := tableWalk{f: f, seen: make(map[uint32]bool)}
	index := int32(len(w.tables) - 1)
	bad := make(map[uint8]*badPart)
	t.visit = func(c chunkNo, v word) {
		switch {
		case c >= end:
			w.tell(f.path, adviceSnapshots, "it has a word for chunk %d, behind the end", c)
		case v.mask() == 0 || !v.hasSlot() && v != zeroWord:
			w.tell(f.path, adviceSnapshots, "the word of chunk %d makes no sense: %016x", c, uint64(v))
		case v.hasSlot():
			if w.inPart(v, bad) {
				w.named = append(w.named, namedSlot{v, index, c})
			}
		}
	}
	err := t.walk(tableRoot, 0, levels)
	for no, b := range bad {
		w.tell(f.path, adviceSnapshots, "%d of its words need what is not there: part %d: %v", b.words, no, b.err)
	}
	return err
}

// badPart counts the words that need what a part does not have.
type badPart struct {
	words int
	err   error
}

// inPart says whether the word's slot exists, or counts it as bad.
func (w *inspector) inPart(v word, bad map[uint8]*badPart) bool {
	no := v.slot().Part()
	n, err := w.Slots(no)
	if err == nil && v.slot().Index() >= n {
		err = fmt.Errorf("it has %d slots only", n)
	}
	if err == nil {
		return true
	}
	b := bad[no]
	if b == nil {
		b = &badPart{err: err}
		bad[no] = b
	}
	b.words++
	return false
}

// tableWalk goes through the table in a file.
type tableWalk struct {
	f     *inspectedFile
	seen  map[uint32]bool
	visit func(chunkNo, word)
}

// walk visits the words below the node at, which is for chunks from first on.
func (t *tableWalk) walk(at uint32, first chunkNo, level int) error {
	n := int64(nodeBytes)
	if level == 0 {
		n = leafBytes
	}
	off := int64(at) * tableUnit
	if off < tableHeader || off+n > t.f.size || t.seen[at] {
		return fmt.Errorf("%w: node at %d", ErrDamaged, off)
	}
	t.seen[at] = true
	b := make([]byte, n)
	if _, err := t.f.ReadAt(b, off); err != nil {
		return cause(err)
	}
	if level == 0 {
		for i := chunkNo(0); i < 1<<leafShift; i++ {
			v := word(host.Uint64(b[i*8:]))
			if !v.sound(first + i) {
				return fmt.Errorf("%w: word of chunk %d", ErrDamaged, first+i)
			}
			if v &^= checkBits; v != 0 {
				t.visit(first+i, v)
			}
		}
		return nil
	}
	span := chunkNo(1) << (leafShift + (level-1)*nodeShift)
	for i := chunkNo(0); i < 1<<nodeShift; i++ {
		if next := host.Uint32(b[i*4:]); next != 0 {
			if err := t.walk(next, first+i*span, level-1); err != nil {
				return err
			}
		}
	}
	return nil
}
