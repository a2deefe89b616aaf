// Which layers a start finds, and which of them are lost.

package cow

import (
	"errors"
	"fmt"
	"os"
	"slices"
)

// foundLayer is a layer, what the register says of it, and why its image is lost.
type foundLayer struct {
	*layer
	entered
	lost error
}

// openLayers opens the layers that the register has, oldest first, if their snapshots
// were live, and removes what else there is. Where one is lost, so are the images up to
// its own: it is a part of their chains. Newer ones are whole.
func (d *Device) openLayers() ([]foundLayer, error) {
	list, lost, err := d.openRegistered()
	if err != nil {
		return nil, err
	}
	var layers []foundLayer
	needed := 0 // up to here images are lost
	for _, e := range list {
		l, err := d.openEntered(e)
		if refused(err) {
			return nil, fmt.Errorf("%s: %w", layerPath(d.dir, layerName, e.number), err)
		}
		if e.spent || err == nil && l.table.spent() {
			if l, err = d.openSpent(l, e, err); err != nil {
				return nil, err
			}
		}
		if err == nil && !l.committed() && d.cat.found[e.snapshot] == nil { // its snapshot did not come about
			if err := errors.Join(l.table.forget(), l.table.close()); err != nil {
				return nil, err
			}
			continue
		}
		layers = append(layers, foundLayer{layer: l, entered: e})
		if err != nil {
			d.cfg.Log.Error("layer lost, and with it the snapshots up to it", "layer", e.number, "err", err)
			needed, lost = len(layers), fmt.Errorf("layer %d, which it needs, is lost: %w", e.number, err)
		}
	}
	if needed == 0 && lost != nil { // the register itself
		needed = len(layers)
	}
	// First the images, and then the layers: whenever this is cut off, no image is taken
	// for whole that lacks one.
	for n, l := range layers[:needed] {
		if l.layer != nil && l.table.spent() {
			continue // its image was lost before
		}
		layers[n].lost = lost
		if l.layer != nil {
			l.lose(lost)
		}
	}
	for n, l := range layers[:needed] {
		if l.layer != nil {
			continue
		}
		if layers[n].layer, err = d.replaceLayer(l.entered, lost); err != nil {
			return nil, err
		}
	}
	return layers, d.removeStrays(layers)
}

// lose notes that the layer's image is lost, unless it was before.
func (l *layer) lose(why error) {
	if kind, _ := l.fault(); kind == faultNone {
		l.setFault(faultFailed, why.Error())
	}
}

// openRegistered opens the register and returns what it has. Where it was lost, for a
// reason, a new one has what can be found, whose images are lost.
func (d *Device) openRegistered() (list []entered, lost, err error) {
	path := d.path(registerName)
	r, lost := openRegister(path)
	if lost == nil {
		if list, lost = r.list(); lost == nil {
			d.register = r
			return list, nil, nil
		}
		lost = errors.Join(lost, r.close())
	}
	if refused(lost) {
		return nil, nil, fmt.Errorf("%s: %w", path, cause(lost))
	}
	if errors.Is(lost, errBlank) {
		lost = errors.New("it is not there")
	}
	lost = fmt.Errorf("the register of its layers is lost: %w", lost)
	layers, err := d.loseLayers(lost)
	if err != nil {
		return nil, nil, err
	}
	if d.register, err = newRegister(path); err != nil {
		return nil, nil, err
	}
	for _, l := range layers {
		if err := errors.Join(d.register.add(l), l.table.close()); err != nil {
			return nil, nil, err
		}
	}
	if list, err = d.register.list(); len(list) == 0 {
		lost = nil // there was nothing to lose
	}
	return list, lost, err
}

// loseLayers opens all layers that can be found, and notes that their images are lost.
func (d *Device) loseLayers(why error) ([]*layer, error) {
	numbers, err := d.numbers(layerName)
	var layers []*layer
	for _, n := range numbers {
		l, err := openLayer(d.dir, n)
		if err != nil {
			continue
		}
		l.lose(why)
		layers = append(layers, l)
	}
	return layers, err
}

// openEntered opens a layer as it was entered.
func (d *Device) openEntered(e entered) (*layer, error) {
	l, err := openLayer(d.dir, e.number)
	if errors.Is(err, errBlank) {
		err = errors.New("its file was emptied")
	}
	if err != nil {
		return nil, cause(err)
	}
	if err := e.check(l.header()); err != nil {
		return nil, errors.Join(err, l.table.close())
	}
	l.table.register, l.table.entry = d.register, e.at
	return l, nil
}

// replaceLayer makes an empty layer in the place of one that is lost, so that its image
// can be shown, as failed, also by later starts. It is entered only when it says so: else
// a start could take it for one of which nothing was lost.
func (d *Device) replaceLayer(e entered, why error) (*layer, error) {
	if err := os.RemoveAll(layerPath(d.dir, layerName, e.number)); err != nil {
		return nil, err
	}
	d.register.remove(e.at)
	l, err := newLayer(d.dir, e.layerHeader)
	if err != nil {
		return nil, err
	}
	l.commit() // for all that is known
	l.setCBT(e.cbt)
	l.lose(why)
	if e.spent {
		l.table.setSpent()
	}
	if err := d.register.add(l); err != nil {
		return nil, errors.Join(err, l.table.forget(), l.table.close())
	}
	return l, nil
}

// removeStrays removes the files of layers that are nobody's.
func (d *Device) removeStrays(layers []foundLayer) error {
	numbers, err := d.numbers(layerName)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		if slices.ContainsFunc(layers, func(l foundLayer) bool { return l.layer.number == n }) {
			continue
		}
		if err := os.RemoveAll(layerPath(d.dir, layerName, n)); err != nil {
			return err
		}
	}
	return nil
}

// numbers are those of the device's files of a name, ascending.
func (d *Device) numbers(name string) ([]uint64, error) { return numbersIn(d.dir, name) }

// numbersIn are those of the files of a name in dir, ascending.
func numbersIn(dir, name string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, e := range entries {
		var n uint64
		if _, err := fmt.Sscanf(e.Name(), name, &n); err == nil && e.Name() == fmt.Sprintf(name, n) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}
