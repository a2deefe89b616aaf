// What the control socket tells about devices, snapshots and the snapstore.

package control

import (
	"blksnap/cow"
)

func (d *Daemon) deviceInfos() []DeviceInfo {
	infos := []DeviceInfo{}
	for _, dev := range d.sortedDevices() {
		infos = append(infos, d.describeDevice(dev))
	}
	return infos
}

func (d *Daemon) deviceInfo(name string) (DeviceInfo, error) {
	dev, err := d.device(name)
	if err != nil {
		return DeviceInfo{}, err
	}
	return d.describeDevice(dev), nil
}

func (d *Daemon) describeDevice(dev *device) DeviceInfo {
	d.mu.Lock()
	clients, snapshots := dev.clients, d.snapshotsOfLocked(dev.Name())
	d.mu.Unlock()
	state := d.stateOf(dev)
	return DeviceInfo{
		Name:      dev.Name(),
		Origin:    dev.Origin(),
		Size:      dev.Size(),
		URI:       d.uri(dev.Name()),
		State:     state,
		Clients:   clients,
		Snapshots: snapshots,
		CBT:       changesOf(dev),
		StoreWait: given(dev.request.StoreWait),
	}
}

// stateOf is what a device's state says, also that it is being rolled back.
func (d *Daemon) stateOf(dev *device) string {
	d.mu.Lock()
	rolling := dev.rolling
	d.mu.Unlock()
	if rolling == "" {
		return dev.State()
	}
	return dev.State() + ", rolling back to " + rolling
}

// tracking is what a device's change tracking is called and counts, as of now or
// frozen with an image.
type tracking interface {
	BlockSize() int64
	Generation() string
	Number() uint64
	Base() uint64
}

func describeChanges(t tracking) ChangesInfo {
	return ChangesInfo{BlockSize: t.BlockSize(), Generation: t.Generation(), Number: t.Number(), Base: t.Base()}
}

// changesOf describes a device's change tracking as of now.
func changesOf(dev *device) ChangesInfo {
	t := dev.Tracking()
	info := describeChanges(t)
	info.Reason, info.Warning = t.Reason(), dev.Warning()
	return info
}

func (d *Daemon) snapshotInfos() []SnapshotInfo {
	infos := []SnapshotInfo{}
	for _, s := range d.allSnapshots() {
		infos = append(infos, d.describe(s))
	}
	return infos
}

func (d *Daemon) snapshotInfo(name string) (SnapshotInfo, error) {
	s, err := d.snapshot(name)
	if err != nil {
		return SnapshotInfo{}, err
	}
	info := d.describe(s)
	for k, i := range s.Images() {
		shares := i.Shares()
		info.Images[k].Shares = &shares
	}
	space := SpaceInfo(d.pool.Outlook())
	info.Store = &space
	return info, nil
}

func (d *Daemon) describe(s *cow.Snapshot) SnapshotInfo {
	info := SnapshotInfo{Name: s.Name(), Created: s.Created(), State: s.State(), HeldUp: s.Held(), MaxStore: s.MaxStore()}
	if end := expires(s); !end.IsZero() {
		info.Expires = &end
	}
	for _, i := range s.Images() {
		info.Writable = info.Writable || i.Writable() // one that was lost before a restart is not
		info.Images = append(info.Images, ImageInfo{
			Device: i.Device().Name(),
			Size:   i.Size(),
			URI:    d.uri(i.Device().Name() + "@" + s.Name()),
			State:  i.State(),
			Holds:  i.Holds(),
			CBT:    describeChanges(i.Changes()),
		})
	}
	return info
}

func (d *Daemon) partInfos() []PartInfo {
	infos := []PartInfo{}
	for _, p := range d.pool.Parts() {
		name := p.Spec
		name.Limit = 0 // it has a field of its own
		infos = append(infos, PartInfo{name.String(), p.Limit, p.Used, p.Free, p.State})
	}
	return infos
}
