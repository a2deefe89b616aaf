// What clients can open over NBD: the daemon as intercept.Exports.

package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"blksnap/cow"
	"blksnap/intercept"
)

// exports is the daemon as the shim sees it. An export is called by its device,
// or by device@snapshot for an image.
type exports struct{ d *Daemon }

func (e exports) List() []intercept.ExportInfo {
	var infos []intercept.ExportInfo
	for _, dev := range e.d.sortedDevices() {
		infos = append(infos, deviceExport(dev))
	}
	for _, s := range e.d.allSnapshots() {
		for _, i := range s.Images() {
			infos = append(infos, imageExport(s, i))
		}
	}
	sortExports(infos)
	return infos
}

func sortExports(infos []intercept.ExportInfo) {
	slices.SortFunc(infos, func(a, b intercept.ExportInfo) int { return strings.Compare(a.Name, b.Name) })
}

func deviceExport(dev *device) intercept.ExportInfo {
	return intercept.ExportInfo{Name: dev.Name(), Description: "live device, origin " + dev.Origin()}
}

func imageExport(s *cow.Snapshot, i *cow.Image) intercept.ExportInfo {
	what := "image"
	if i.Writable() {
		what = "writable image"
	}
	return intercept.ExportInfo{
		Name:        i.Device().Name() + "@" + s.Name(),
		Description: fmt.Sprintf("%s of %s, taken %s", what, i.Device().Name(), s.Created().UTC().Format("2006-01-02 15:04:05 UTC")),
	}
}

func (e exports) Open(_ context.Context, name, client string) (intercept.Export, error) {
	if e.d.isStopping() {
		return intercept.Export{}, errStopping()
	}
	device, snapshot, image := strings.Cut(name, "@")
	if image {
		return e.openImage(device, snapshot)
	}
	return e.openDevice(device)
}

// openDevice opens a live device, the only one if name is empty.
func (e exports) openDevice(name string) (intercept.Export, error) {
	e.d.mu.Lock()
	defer e.d.mu.Unlock()
	if name == "" && len(e.d.devices) == 1 {
		for only := range e.d.devices {
			name = only
		}
	}
	dev := e.d.devices[name]
	switch {
	case dev == nil && name == "":
		return intercept.Export{}, refuse(syscall.ENOENT, "name an export: there are %s", plural(len(e.d.devices), "device"))
	case dev == nil:
		return intercept.Export{}, unknownDevice(name)
	case dev.rolling != "":
		return intercept.Export{}, errRollingBack(dev)
	}
	e.d.countClientLocked(dev)
	return intercept.Export{
		ExportInfo: deviceExport(dev),
		Device:     exportedDevice{dev.Device, mapper{e.d, dev.Name(), dev.Changes, dev.Runs}, dev.Size()},
		Release:    func() { e.d.dropClient(dev) },
	}, nil
}

// openImage opens an image, which counts as in use until it is released.
func (e exports) openImage(device, snapshot string) (intercept.Export, error) {
	s, err := e.d.snapshot(snapshot)
	if err != nil {
		return intercept.Export{}, err
	}
	i, ok := s.Image(device)
	if !ok {
		return intercept.Export{}, refuse(syscall.ENOENT, "snapshot %s has no device %q", snapshot, clip(device))
	}
	if err := i.Acquire(); err != nil {
		return intercept.Export{}, fmt.Errorf("open %s@%s: %w", device, snapshot, err)
	}
	e.d.mu.Lock()
	e.d.countClientLocked(nil)
	e.d.mu.Unlock()
	return intercept.Export{
		ExportInfo: imageExport(s, i),
		Device:     exportedImage{i, mapper{e.d, device, i.Changes, i.Runs}},
		Release: func() {
			i.Release()
			e.d.dropClient(nil)
		},
		Gone: i.Gone(),
	}, nil
}

// exportedDevice and exportedImage add block status to what the engine serves. A
// client goes on with the size that it was told, also where the device is resized.
type (
	exportedDevice struct {
		*cow.Device
		mapper
		size int64
	}
	exportedImage struct {
		*cow.Image
		mapper
	}
)

func (e exportedDevice) Size() int64 { return e.size }

func (e exportedDevice) Read(p []byte, off int64) error {
	e.mapper.d.reads.wait()
	return e.Device.Read(p, off)
}

func (e exportedDevice) TryRead(p []byte, off int64) error {
	if e.mapper.d.reads.held() {
		return intercept.ErrWouldBlock
	}
	return e.Device.TryRead(p, off)
}

func (e exportedImage) Read(p []byte, off int64) error {
	e.mapper.d.reads.wait()
	return e.Image.Read(p, off)
}

// holder holds reads back, for a moment (ground.go).
type holder struct{ gate atomic.Pointer[chan struct{}] }

// hold begins that. One caller at a time.
func (h *holder) hold() (release func()) {
	gate := make(chan struct{})
	h.gate.Store(&gate)
	return func() {
		h.gate.Store(nil)
		close(gate)
	}
}

func (h *holder) held() bool { return h.gate.Load() != nil }

func (h *holder) wait() {
	if gate := h.gate.Load(); gate != nil {
		<-*gate
	}
}

var (
	_ intercept.Device    = exportedDevice{}
	_ intercept.Device    = exportedImage{}
	_ intercept.TryReader = exportedDevice{}
	_ intercept.TryWriter = exportedDevice{}
	_ intercept.Mapper    = exportedDevice{}
	_ intercept.Mapper    = exportedImage{}
)
