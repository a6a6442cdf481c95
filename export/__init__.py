"""Make artefacts: ONNX graphs and engines, checked when they are made. Installed as
`regionspot.export`.
"""
