// Snapshots: taking one of several devices at one instant, destroying it.

package cow

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Snapshot is the state of one or more devices at one instant.
type Snapshot struct {
	catalogue *Catalogue
	record    record
	name      string
	note      []byte
	created   time.Time
	held      time.Duration
	images    []*Image // by name of the device
	most      int64    // blocks that it may take of the snapstore, 0: as many as there are
	lost      int      // images that a predecessor had and nobody finds any more

	// blocks is how many of most its images count (limit.go).
	blocks atomic.Int64

	// mu protects the images' users. Never held across I/O.
	mu        sync.Mutex
	destroyed bool
}

// takeLimit is how long writes in flight are waited for by default.
const takeLimit = 2 * time.Second

// prepared is what one device needs for the instant, made before it.
type prepared struct {
	device *Device
	layer  *layer
	shield *shield
	image  *Image
}

// TakeOptions are how a snapshot is taken. The zero value of a field is its
// default.
type TakeOptions struct {
	// Limit is how long writes in flight are waited for (2 s).
	Limit time.Duration

	// Note is what the caller wants to find again with the snapshot after a
	// restart, 404 bytes at most.
	Note []byte

	// Writable makes images that can be written to.
	Writable bool

	// MaxStore is how many bytes of the snapstore the snapshot may need: what is
	// preserved of its devices from its instant on, also where others need it too,
	// and what is written to its images. An image for which one more would have to
	// be preserved is lost, as if the snapstore had overflowed; what is written to
	// an image finds no space. 0: no limit; else at least blockSize.
	MaxStore int64
}

// Take takes a snapshot of the devices, all at one instant: a write that was
// acknowledged before another was sent is in it if the other is. Writes that
// arrive meanwhile wait; those in flight are waited for, and where they take
// longer than the limit Take fails, names the device, and has changed nothing.
// The same device twice is an error.
//
// When Take returns, the snapshot outlives the process. If the process dies
// before, there is a snapshot of all the devices or of none.
func (c *Catalogue) Take(name string, devices []*Device, o TakeOptions) (*Snapshot, error) {
	if o.Limit == 0 {
		o.Limit = takeLimit
	}
	s, err := c.take(name, devices, o)
	if err != nil {
		return nil, fmt.Errorf("take snapshot %s: %w", name, err)
	}
	return s, nil
}

func (c *Catalogue) take(name string, devices []*Device, o TakeOptions) (*Snapshot, error) {
	if len(devices) == 0 {
		return nil, fmt.Errorf("no device: %w", syscall.EINVAL)
	}
	if o.MaxStore < 0 || o.MaxStore > 0 && o.MaxStore < blockSize {
		return nil, fmt.Errorf("a limit of %d bytes is less than a block of %d: %w", o.MaxStore, blockSize, syscall.EINVAL)
	}
	devices = slices.Clone(devices)
	slices.SortFunc(devices, func(a, b *Device) int { return cmp.Compare(a.serial, b.serial) })
	for i, d := range devices[1:] {
		if d == devices[i] {
			return nil, fmt.Errorf("device %s is named twice: %w", d.name, syscall.EINVAL)
		}
	}
	// All of the devices' locks in one order, so that two snapshots of the
	// same devices do not wait for each other for ever.
	for _, d := range devices {
		d.taking.Lock()
		defer d.taking.Unlock()
	}
	r, id, err := c.prepare(name, o.Note, len(devices))
	if err != nil {
		return nil, err
	}
	s := &Snapshot{catalogue: c, record: r, name: name, note: o.Note, most: o.MaxStore / blockSize}
	preps := make([]*prepared, 0, len(devices))
	for _, d := range devices {
		p, err := d.prepareGuarded(s, id, o)
		if err != nil {
			return nil, errors.Join(err, s.discard(preps))
		}
		preps = append(preps, p)
	}
	if err := s.instant(preps, o.Limit); err != nil {
		return nil, errors.Join(err, s.discard(preps))
	}
	for _, p := range preps {
		p.device.noteStamp()
		s.images = append(s.images, p.image)
	}
	s.sortImages()
	return s, nil
}

func (s *Snapshot) sortImages() {
	slices.SortFunc(s.images, func(a, b *Image) int { return cmp.Compare(a.device.name, b.device.name) })
}

// prepareGuarded is prepare. It fails where memory faults.
func (d *Device) prepareGuarded(s *Snapshot, id uint64, o TakeOptions) (p *prepared, err error) {
	err = fmt.Errorf("%s: %w", d.name, errFaulted)
	d.guarded(func() { p, err = d.prepare(s, id, o) })
	return p, err
}

// prepare makes everything that the instant needs, so that nothing is allocated
// and nothing can fail while writes wait.
func (d *Device) prepare(s *Snapshot, id uint64, o TakeOptions) (*prepared, error) {
	if d.stopped() {
		return nil, fmt.Errorf("%s: %w", d.name, ErrStopping)
	}
	if d.rollback.Load() != nil {
		return nil, fmt.Errorf("%s: %w", d.name, ErrRollback)
	}
	if err := d.changes().Prepare(); err != nil {
		return nil, fmt.Errorf("%s: %w", d.name, err)
	}
	if u := d.durable.Load(); u != nil {
		d.keepUp("reserve a number", u, func() error { return u.regions.reserve(d.nextNumber()) })
	}
	h := layerHeader{number: d.nextLayer, size: d.Size(), snapshot: id, writable: o.Writable, most: s.most, random: rand.Uint64()}
	l, err := newLayer(d.dir, h)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.name, err)
	}
	d.nextLayer++
	d.cat.did("make a layer")
	i := &Image{device: d, snapshot: s, size: h.size, layer: l, gone: make(chan struct{})}
	if o.Writable {
		if i.overlay, err = newOverlay(d.dir, h); err != nil {
			return nil, fmt.Errorf("%s: %w", d.name, errors.Join(err, l.table.forget(), l.table.close()))
		}
		d.cat.did("make an overlay")
	}
	if err := d.enter(i); err != nil {
		return nil, fmt.Errorf("%s: %w", d.name, err)
	}
	l.image, l.table.image = i, i
	d.mu.Lock()
	d.layers = slices.Grow(d.layers, 1)
	d.images = slices.Grow(d.images, 1)
	d.mu.Unlock()
	return &prepared{d, l, &shield{[]*layer{l}, h.size}, i}, nil
}

// enter enters the layer of an image that is being prepared, or undoes what was made of
// it.
func (d *Device) enter(i *Image) error {
	err := d.register.add(i.layer)
	if err == nil {
		d.cat.did("enter a layer")
		return nil
	}
	if o := i.overlay; o != nil {
		err = errors.Join(err, o.table.forget(), o.table.close())
	}
	return errors.Join(err, i.layer.table.forget(), i.layer.table.close())
}

// discard undoes prepare.
func (s *Snapshot) discard(preps []*prepared) error {
	var errs []error
	for _, p := range preps {
		if p.image.frozen != nil {
			p.device.always(p.image.frozen.Release)
		}
		errs = append(errs, p.device.forget(p.layer.table), p.layer.table.close())
		if o := p.image.overlay; o != nil {
			errs = append(errs, p.device.forget(o.table), o.table.close())
		}
	}
	s.catalogue.release(s.record)
	return errors.Join(errs...)
}

// instant shuts the gates of all devices, waits until nobody is inside any, and
// makes the snapshot.
func (s *Snapshot) instant(preps []*prepared, limit time.Duration) error {
	start := time.Now()
	for _, p := range preps {
		p.device.writers.shut()
	}
	defer func() {
		for _, p := range preps {
			p.device.writers.open()
		}
		s.held = time.Since(start)
		s.catalogue.guarded(func() { s.record.setHeld(s.held) })
	}()
	deadline := start.Add(limit)
	for _, p := range preps {
		if !p.device.writers.empty(deadline) {
			return fmt.Errorf("%s: writes in flight did not end within %v: %w", p.device.name, limit, syscall.ETIMEDOUT)
		}
	}
	s.created = time.Now()
	for _, p := range preps {
		err := errFaulted
		p.device.guarded(func() { err = p.freeze() })
		if err != nil {
			return fmt.Errorf("%s: %w", p.device.name, err)
		}
	}
	if !s.catalogue.guarded(func() {
		s.record.setTaken(s.created)
		s.record.setState(stateLive) // now it is a snapshot, of all devices
	}) {
		return errCatalogue
	}
	s.catalogue.did("make a snapshot live")
	for _, p := range preps {
		p.commit()
	}
	// Before writes go on: of an image that they break the layer may be closed at any time.
	for _, p := range preps {
		p.device.guarded(p.layer.commit)
		s.catalogue.did("commit a layer")
	}
	return nil
}

// freeze freezes the change map. Nobody is inside the gate.
func (p *prepared) freeze() (err error) {
	d := p.device
	if d.changes().Lost() {
		d.newGeneration("no memory for the change map")
		d.poke()
	}
	if p.image.frozen, err = d.changes().Freeze(); err != nil {
		return err
	}
	p.layer.setCBT(p.image.frozen.Number())
	d.cat.did("freeze a change map")
	return nil
}

// commit makes p's layer the head. Nobody is inside the gate.
func (p *prepared) commit() {
	d := p.device
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.layers); n > 0 {
		d.layers[n-1].newer.Store(p.layer)
		if d.layers[n-1].image == nil {
			d.askLocked() // it can be folded, now that it is not the head
		}
	}
	d.layers = append(d.layers, p.layer)
	d.addImageLocked(p.image)
	d.shield.Store(p.shield)
}

// addImageLocked makes an image one of the device's healthy ones.
func (d *Device) addImageLocked(i *Image) {
	d.images = append(d.images, i)
	if i.snapshot.most != 0 {
		d.limits.Add(1)
	}
}

// Name is the snapshot's name.
func (s *Snapshot) Name() string { return s.name }

// Note is TakeOptions.Note.
func (s *Snapshot) Note() []byte { return s.note }

// Created is the instant.
func (s *Snapshot) Created() time.Time { return s.created }

// Held is how long writes were held up when the snapshot was taken, those in
// flight included.
func (s *Snapshot) Held() time.Duration { return s.held }

// Images are the images by the names of their devices; without those that a restart
// has not found, which State tells of.
func (s *Snapshot) Images() []*Image { return s.images }

// Image returns the image of a device.
func (s *Snapshot) Image(device string) (*Image, bool) {
	for _, i := range s.images {
		if i.device.name == device {
			return i, true
		}
	}
	return nil, false
}

// State is the worst state of its images: "ok", "overflowed", or "failed: " and
// why.
func (s *Snapshot) State() string {
	worst := "ok"
	if s.lost > 0 {
		worst = fmt.Sprintf("failed: %d of %d images were lost before the last start", s.lost, s.lost+len(s.images))
	}
	for _, i := range s.images {
		switch st := i.State(); {
		case st == "ok":
		case worst == "ok", worst == "overflowed" && st != "overflowed":
			worst = st
		}
	}
	return worst
}

// Destroy ends the snapshot: its images answer ErrDestroyed from then on, and
// what only they needed returns to the snapstore, usually before Destroy returns.
// It is refused with EBUSY while an image is in use, unless force is set, with
// ErrRollback while a device is rolled back to it, and with ErrDestroyed the
// second time.
func (s *Snapshot) Destroy(force bool) error {
	s.mu.Lock()
	if s.destroyed {
		s.mu.Unlock()
		return fmt.Errorf("destroy snapshot %s: %w", s.name, ErrDestroyed)
	}
	for _, i := range s.images {
		if err := i.busyLocked(force); err != nil {
			s.mu.Unlock()
			return fmt.Errorf("destroy snapshot %s: %w", s.name, err)
		}
	}
	s.destroyed = true
	s.mu.Unlock()
	s.end()
	for _, i := range s.images {
		i.device.settle(settleLimit)
	}
	return nil
}

// end destroys the images. From the first store on, a start would finish it.
func (s *Snapshot) end() {
	s.catalogue.guarded(func() { s.record.setState(stateDying) })
	s.catalogue.did("let a snapshot die")
	for _, i := range s.images {
		i.destroy()
	}
	s.catalogue.release(s.record)
}
